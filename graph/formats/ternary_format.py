"""The ternary format: what a weight is made of while it trains, and once it is packed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from graph.errors import QcError
from graph.formats.format import Call, Rows, V, has_data
from graph.formats.ternary import dequantize_ternary, fake_quantize_ternary
from graph.formats.ternary_rule import Grid, TernaryRule
from graph.formats.trits import PACKINGS, Packing, pack_trits, trit_bytes, unpack_trits

UNKNOWN = TernaryRule("round-clip", None, "least-squares")
"""The rule by which floats are packed anew where a graph holds integers and no longer says how they were found."""


@dataclass(frozen=True, kw_only=True)
class Ternary:
    """Weights of so many ``columns``: ``indices`` u8 [out, bytes] and ``scale`` [out, groups], or [1, 1].

    While the weight trains, ``latent`` [out, in] is all there is; beside it ``scale`` where that trains by itself, and
    ``moments`` f32 [in] where they weigh the fit of the scale.
    """

    parameters: ClassVar[tuple[str, ...]] = ("latent", "scale")

    columns: int
    by: TernaryRule = field(default_factory=TernaryRule)
    latent: bool = True
    own_scale: bool = False
    """Whether a latent weight has a scale of its own, which can train."""

    weighted: bool = False
    """Whether a latent weight has moments beside it."""

    packing: Packing = "2bit"
    baked: bool = False
    """Whether the scales of packed weights are stored in fp16."""

    @staticmethod
    def of(given: Mapping[str, Any], value: Tensor) -> Ternary:
        """The format of a weight [out, in] that an op computes from what it is given, stand-ins for tensors."""
        columns = int(value.shape[1])
        if "latent" in given:
            by = TernaryRule.named(given["rule"], given["tau"], given["fit"], given["group"])
            own, weighted = given.get("scale") is not None, given.get("moments") is not None
            return Ternary(columns=columns, by=by, own_scale=own, weighted=weighted)
        scale = given["scale"]
        whole = tuple(scale.shape) == (1, 1) and value.shape[0] > 1
        return Ternary(
            columns=columns,
            by=replace(UNKNOWN, group=None if whole else columns // int(scale.shape[1])),
            latent=False,
            packing=next(packing for packing in PACKINGS if packing == given["packing"]),
            baked=scale.dtype == torch.float16,
        )

    @property
    def name(self) -> str:
        shared = {None: "one scale", self.columns: "one scale a row"}.get(self.by.group, f"groups of {self.by.group}")
        return f"ternary, {shared}"

    def problem(self, name: str, shape: tuple[int, ...]) -> QcError | None:
        """Groups have to divide the rows; vectors are never ternary."""
        if len(shape) != 2:
            what = f"{name} has the shape {list(shape)}; ternary weights are of two dimensions"
            return QcError(what, fix="exclude it from select")
        if self.by.group is not None and shape[1] % self.by.group:
            fitting = next(size for size in range(min(self.by.group, shape[1]), 0, -1) if shape[1] % size == 0)
            what = f"group {self.by.group} does not divide the {shape[1]} input columns of {name}"
            return QcError(what, fix=f"set it to {fitting} or another divisor of {shape[1]}")
        return None

    def pack(self, w: Tensor, moments: Tensor | None = None) -> dict[str, Tensor]:
        """w: [out, in], float    moments: [in], the inputs' mean squares, or None  ->  the side tensors."""
        assert w.shape[1] == self.columns, f"a weight of {w.shape[1]} columns in a format of {self.columns}"
        if not self.latent:
            return self.frozen(self.by.fitted(w, moments), w)
        sides = {"latent": w}
        if self.own_scale:
            sides["scale"] = self.by.fitted(w, moments).scale
        if self.weighted:
            sides["moments"] = w.new_ones(self.columns, dtype=torch.float32) if moments is None else moments
        return sides

    def frozen(self, grid: Grid, w: Tensor) -> dict[str, Tensor]:
        """The integers of w on a grid, and its scales, as they are stored once they are packed."""
        scale = grid.scale.to(torch.float16 if self.baked else torch.float32, copy=True)
        return {"indices": pack_trits(grid.codes(w), self.packing), "scale": scale}

    def grid(self, packed: Mapping[str, Tensor]) -> Grid:
        """Thresholds and scales of a latent weight as it is now."""
        grid = self.by.fitted(packed["latent"].detach(), packed.get("moments"))
        return grid.with_scale(packed["scale"]) if self.own_scale else grid

    def call(self, packed: Mapping[str, V], dtype: torch.dtype) -> Call:
        """``qc.fake_quantize_ternary`` or ``qc.dequantize_ternary``, and its arguments."""
        if "latent" in packed:
            sides: dict[str, Any] = {key: packed[key] for key in ("scale", "moments") if key in packed}
            by = self.by
            return fake_quantize_ternary, (packed["latent"], dtype, by.rule, by.tau, by.fit, by.group), sides
        return dequantize_ternary, (packed["indices"], packed["scale"], self.columns, self.packing, dtype), {}

    def by_row(self, packed: Mapping[str, Tensor]) -> Rows:
        """Packed, with a scale for every row; of a latent weight also the thresholds, by which it was packed."""
        rows = packed["latent" if self.latent else "indices"].shape[0]
        sides = dict(packed)
        if self.latent:
            grid = self.grid(packed)
            integers = replace(self, latent=False).frozen(grid, packed["latent"].detach())
            sides = {**integers, "threshold": grid.threshold.expand(rows, -1)}
        sides["scale"] = sides["scale"].expand(rows, -1)
        return lambda part: {key: side[part] for key, side in sides.items()}

    def widest_error(self, w: Tensor, packed: Mapping[str, Tensor], largest: float) -> Tensor:
        """``|w|`` where it becomes 0, ``||w| - scale|`` elsewhere; at the threshold, or without one, the larger."""
        magnitude = w.float().abs()
        scale = _columns(packed["scale"].float(), w)
        as_zero, as_one = magnitude, (magnitude - scale.abs()).abs()
        either = torch.maximum(as_zero, as_one)
        if "threshold" not in packed:
            return either
        threshold = _columns(packed["threshold"], w)
        told = torch.where(magnitude < threshold, as_zero, as_one)
        return torch.where((magnitude - threshold).abs() <= 1e-6 * threshold, either, told)

    def zeros(self, packed: Mapping[str, Tensor]) -> int:
        """How many of the weights are 0; of a plan 0."""
        holder = packed["latent" if self.latent else "indices"]
        if not has_data(holder):
            return 0
        codes = self.grid(packed).codes(holder.detach()) if self.latent else self._codes(holder)
        return int((codes == 1).sum())

    def _codes(self, indices: Tensor) -> Tensor:
        return unpack_trits(indices, self.packing, self.columns)

    def bytes_packed(self, rows: int, packing: Packing) -> int:
        """The bytes of a weight of so many rows, with scales in fp16."""
        return rows * trit_bytes(self.columns, packing) + 2 * self._scales(rows)

    def _scales(self, rows: int) -> int:
        shape = self.by.scale_shape((rows, self.columns))
        return shape[0] * shape[1]


def _columns(per_group: Tensor, w: Tensor) -> Tensor:
    """[out, groups]  ->  [out, in]."""
    return per_group.repeat_interleave(w.shape[1] // per_group.shape[1], dim=1)
