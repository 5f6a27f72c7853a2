"""What can be asked of a checkpoint for a GPU server. Nothing but the standard library is imported here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from graph.errors import QcError

Target: TypeAlias = Literal["fp8", "nvfp4", "mxfp8", "mxfp4", "int2", "int4", "int8", "nf4", "mixed"]
Scheme: TypeAlias = Literal["channel", "tensor", "block", "static"]
Dialect: TypeAlias = Literal["compressed-tensors", "modelopt", "hf"]
KvCache: TypeAlias = Literal["fp8"]

TARGETS: tuple[Target, ...] = get_args(Target)

_CACHED = ("kv_cache", "calibration")

OPTIONS: dict[str, tuple[str, ...]] = {
    "fp8": ("scheme", "weight_only", "dialect", *_CACHED),
    "nvfp4": ("weight_only", "dialect", *_CACHED),
    "mxfp8": ("weight_only", "dialect", *_CACHED),
    "mxfp4": ("weight_only", *_CACHED),
    "int8": ("weight_only", "group", *_CACHED),
    "int4": ("group", *_CACHED),
    "int2": _CACHED,
    "nf4": (),
    "mixed": ("weight_only", *_CACHED),
}
"""The options that each target has."""

BF16 = ("fp8", "nvfp4", "mxfp8", "mxfp4", "mixed")
"""The targets where what stays as it is is written in bf16, if nothing else is asked for; elsewhere it is fp16."""

BLOCK = 128
"""Rows and columns of a block of fp8."""

_DIALECTS: dict[str, tuple[str, ...]] = {
    "fp8": get_args(Dialect), "nvfp4": ("compressed-tensors", "modelopt"), "mxfp8": get_args(Dialect),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What is asked for. ``mistakes`` are those of options that do not go together."""

    target: Target
    scheme: Scheme | None = None
    """fp8: what shares a scale of weights; static: the whole weight, and inputs have a scale known beforehand."""

    weight_only: bool = False
    """Leave what linears read as it is."""

    dialect: Dialect = "compressed-tensors"
    group: int | None = None
    """int4, int8: the weights of a row that share a scale. int8 has groups where inputs stay as they are."""

    kv_cache: KvCache | None = None
    """What keys and values are kept in, under scales known beforehand; without it, servers decide."""

    def mistakes(self) -> Iterator[QcError]:
        """What no model could be written as."""
        known = _DIALECTS.get(self.target, ("compressed-tensors",))
        if self.dialect not in known:
            what = f"{self.target} is not written in the dialect {self.dialect}"
            yield QcError(what, fix=f"take dialect out, or use one of {', '.join(known)}")
        if self.dialect == "hf" and self.scheme not in (None, "block"):
            what = f"the dialect hf has fp8 in blocks, and scheme is {self.scheme}"
            yield QcError(what, fix="set scheme to block")
        if self.dialect == "modelopt" and self.target == "fp8":
            yield from self._not_in_modelopt()
        if self.weight_only and (self.dialect == "hf" or (self.dialect == "modelopt" and self.target == "mxfp8")):
            what = f"the dialect {self.dialect} has inputs of {self.target} rounded"
            yield QcError(f"{what}, and weight_only leaves them as they are", fix="take weight_only out, or dialect")
        if self.weight_only and self.scheme == "static":
            what = "scheme static gives inputs a scale, and weight_only leaves them as they are"
            yield QcError(what, fix="set scheme to tensor, or take weight_only out")
        if self.kv_cache is not None and self.dialect == "hf":
            what = "the dialect hf has no place for scales of the cache"
            yield QcError(what, fix="take kv_cache out, or export to fp8 without a dialect")

    def _not_in_modelopt(self) -> Iterator[QcError]:
        if self.scheme == "tensor":
            what = "the dialect modelopt has no fp8 with one scale a weight and inputs scaled by token"
            yield QcError(what, fix="set scheme to channel or static")
        if self.weight_only and self.scheme != "block":
            what = f"the dialect modelopt has weight-only fp8 in blocks, and scheme is {self.scheme or 'channel'}"
            yield QcError(what, fix="set scheme to block, or take weight_only out")

    @property
    def inputs(self) -> tuple[str, int] | None:
        """How inputs of linears are rounded: the kind, and the values that share a scale (0: all of a token)."""
        blocks = self.dialect == "modelopt" and self.scheme == "block"  # of which it has weight-only alone
        if self.weight_only or blocks or self.target in ("int2", "int4", "nf4", "mixed"):
            return None
        if self.target == "int8" and self.group:
            return None
        if self.target == "fp8":
            return "fp8", BLOCK if self.scheme == "block" else 0
        return self.target, {"nvfp4": 16, "mxfp8": 32, "mxfp4": 32}.get(self.target, 0)

    @property
    def bf16_only(self) -> bool:
        """Whether transformers computes with it beside bf16 and nothing else."""
        return self.target in ("nvfp4", "mxfp8", "mxfp4") or self.dialect == "hf"

    @property
    def reads_text(self) -> bool:
        """Whether the export has to see a text, unless the graph knows all ranges."""
        return self.calibrated or self.target == "mixed" or self.kv_cache is not None

    @property
    def calibrated(self) -> bool:
        """Whether something has to be known of the inputs beforehand."""
        return self.inputs is not None and (self.target == "nvfp4" or self.scheme == "static")
