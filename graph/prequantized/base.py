"""What a packed checkpoint holds, whoever packed it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from graph.errors import QcError
from graph.formats.activations import InputKind
from graph.formats.format import Format
from graph.weights import Stored

Stores: TypeAlias = Mapping[str, Stored]
"""The tensors of a checkpoint by their keys."""


@dataclass(frozen=True)
class Inputs:
    """How what a linear reads is rounded."""

    kind: InputKind
    columns: int = 0
    """The values of a token that share a scale; 0: all."""

    given: Stored | None = None
    """The scale, or of NVFP4 the divisor, that is known beforehand."""


@dataclass(frozen=True)
class Held:
    """A weight [out, in] that a checkpoint holds packed."""

    shape: tuple[int, int]
    form: Format
    load: Callable[[], dict[str, Tensor]]
    """Reads the side tensors, as the format has them."""

    inputs: Inputs | None = None


class Method(Protocol):
    """A module that reads the checkpoints of one method."""

    def held(self, config: Mapping[str, Any], tensors: Stores) -> dict[str, Held]:
        """The packed weights, by the key that each would have if it were dense: ``….up_proj.weight``.

        Raises QcError for what it does not read.
        """


METHODS = {
    "compressed-tensors": "compressed",
    "bitsandbytes": "bitsandbytes",
    "gptq": "gptq",
    "awq": "awq",
    "fp8": "fp8",
    "mxfp8": "fp8",
}
"""What ``quant_method`` says, and the module that reads it."""

FULL = "give the model before it was quantized, and let quantize-base do it"
"""What helps where a checkpoint cannot be read."""


def find(config: Mapping[str, Any], tensors: Stores) -> dict[str, Held]:
    """The packed weights of a checkpoint whose config.json has this ``quantization_config``."""
    method = str(config.get("quant_method", "")) or ("bitsandbytes" if _is_old(config) else "an unnamed method")
    if method not in METHODS:
        what = f"the weights are packed by {method}, which qc does not read"
        raise QcError(what, fix=f"{FULL}; packed checkpoints of {', '.join(METHODS)} are read")
    reader: Method = import_module(f"graph.prequantized.{METHODS[method]}")
    found = reader.held(config, tensors)
    if not found:
        what = f"config.json says that {method} has packed the weights, and no packed one is there"
        raise QcError(what, fix="fetch the checkpoint again, or take quantization_config out of config.json")
    for name, one in found.items():
        problem = one.form.problem(name, one.shape)
        if problem is not None:
            raise QcError(problem.what, fix=FULL)
    return found


def _is_old(config: Mapping[str, Any]) -> bool:
    """Early configurations of bitsandbytes do not name it."""
    return bool(config.get("load_in_4bit") or config.get("load_in_8bit"))


def expected(tensors: Stores, key: str) -> Stored:
    """The tensor ``key``, which a packed weight cannot do without."""
    if key not in tensors:
        raise QcError(f"{key} is missing beside the packed weight it belongs to", fix="fetch the checkpoint again")
    return tensors[key]


def modules(tensors: Stores, suffix: str) -> list[str]:
    """What stands before ``suffix`` in the keys that end in it, in order."""
    return [key.removesuffix(suffix) for key in tensors if key.endswith(suffix)]
