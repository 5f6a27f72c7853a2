"""An ONNX model while it is written: its nodes, and its tensors, whose values are asked for when the file is written.

Nothing here knows the ``onnx`` package: types have the names that ONNX gives them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graph import QcError
from graph.weights import all_finite

Array = NDArray[Any]

OPSET, IR = 26, 13
"""What the newest ONNX Runtime reads: versions of the set of ops, and of the file."""

BITS = {
    "FLOAT": 32, "FLOAT16": 16, "INT64": 64, "INT32": 32, "INT8": 8, "UINT8": 8, "BOOL": 8, "DOUBLE": 64,
    "INT4": 4, "UINT4": 4, "INT2": 2, "UINT2": 2, "FLOAT8E4M3FN": 8,
}  # fmt: skip
"""Type -> the bits that a value has in the file."""

TYPES = {
    torch.float32: "FLOAT", torch.float16: "FLOAT16", torch.float64: "DOUBLE", torch.int64: "INT64",
    torch.int32: "INT32", torch.int8: "INT8", torch.uint8: "UINT8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "FLOAT8E4M3FN",
}  # fmt: skip
"""Dtype of a graph -> the type that has the same values."""


@dataclass(frozen=True)
class Held:
    """A stored tensor: its type is known at once, its bytes are asked for when their turn comes."""

    name: str
    type: str
    shape: tuple[int, ...]
    load: Callable[[], bytes | Array]

    @property
    def bytes(self) -> int:
        """What it comes to in the file. Values of less than a byte share bytes, the first in the low bits."""
        return -(-int(np.prod(self.shape, dtype=np.int64)) * BITS[self.type] // 8)


@dataclass(frozen=True)
class Node:
    """An op of ONNX. Inputs that are left out are empty."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]


@dataclass(frozen=True)
class Port:
    """An input or an output; sizes that are no numbers have names."""

    name: str
    type: str
    dims: tuple[int | str, ...]


@dataclass
class Program:
    """The model."""

    nodes: list[Node] = field(default_factory=list)
    tensors: dict[str, Held] = field(default_factory=dict)
    inputs: list[Port] = field(default_factory=list)
    outputs: list[Port] = field(default_factory=list)
    _used: dict[str, int] = field(default_factory=dict)
    _constants: dict[tuple[str, tuple[int, ...], bytes], str] = field(default_factory=dict)

    def fresh(self, name: str) -> str:
        """A name that nothing has yet: ``name``, ``name.2`` and so on."""
        count = self._used[name] = self._used.get(name, 0) + 1
        return name if count == 1 else self.fresh(f"{name}.{count}")

    def add(self, site: str, kind: str, inputs: Sequence[str], results: int = 1, **attributes: Any) -> list[str]:
        """Append a node of the site; the names of its results."""
        names = [self.fresh(f"{site}:{kind}") for _ in range(results)]
        self.nodes.append(Node(kind, tuple(inputs), tuple(names), attributes))
        return names

    def constant(self, value: Array) -> str:
        """A small tensor whose value is known; equal ones are one."""
        kind = TYPES[torch.from_numpy(np.atleast_1d(value)).dtype]
        data = np.ascontiguousarray(value).tobytes()
        key = (kind, value.shape, data)
        if key not in self._constants:
            name = self.fresh("constant")
            self.tensors[name] = Held(name, kind, value.shape, lambda: data)
            self._constants[key] = name
        return self._constants[key]

    def hold(self, name: str, kind: str, shape: Sequence[int], load: Callable[[], bytes | Array]) -> str:
        """A stored tensor; who asks for a name again gets the tensor that has it."""
        if name not in self.tensors:
            assert self.fresh(name) == name, f"a value is called {name}"
            self.tensors[name] = Held(name, kind, tuple(shape), load)
        return name

    def name_last(self, name: str) -> None:
        """Give the one result of the last node another name."""
        self.nodes[-1] = replace(self.nodes[-1], outputs=(self.fresh(name),))

    def prune(self) -> None:
        """Drop nodes and tensors that no output needs."""
        needed = {port.name for port in self.outputs}
        kept = []
        for node in reversed(self.nodes):
            if needed & set(node.outputs):
                kept.append(node)
                needed |= set(node.inputs)
        self.nodes = kept[::-1]
        self.tensors = {name: held for name, held in self.tensors.items() if name in needed}

    def weight_bytes(self) -> int:
        """The bytes of all stored tensors."""
        return sum(held.bytes for held in self.tensors.values())


def plain(value: Tensor, name: str) -> Array:
    """A tensor's values as they are; a QcError where one is no number."""
    if not all_finite(value):
        bad = value[~torch.isfinite(value)][0].item()
        what = f"{name} holds {bad} in {str(value.dtype).removeprefix('torch.')}"
        wider = "export with dtype fp32, or " if value.dtype is torch.float16 else ""
        raise QcError(what, site=name, fix=f"{wider}repair the model")
    value = value.detach().contiguous().cpu()
    return value.view(torch.uint8).numpy() if value.dtype is torch.float8_e4m3fn else value.numpy()


def joined(codes: Tensor, bits: int) -> bytes:
    """Values of less than a byte, u8 of any shape, as they lie in the file: one behind the other, low bits first."""
    flat = codes.reshape(-1)
    per_byte = 8 // bits
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % per_byte)).view(-1, per_byte)
    found = flat[:, 0].clone()
    for i in range(1, per_byte):
        found |= flat[:, i] << bits * i
    return found.numpy().tobytes()
