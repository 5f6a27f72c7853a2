"""The LUT format: which levels and scales a weight gets, and what it is made of when it is packed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from graph.errors import QcError
from graph.formats.bits import bits_for, pack_bits, packed_columns
from graph.formats.feedback import levels_by_row, rounded_with_feedback
from graph.formats.format import Call, Rows, V, has_data
from graph.formats.levels import fit_levels, trainable_levels, uniform_levels
from graph.formats.low_rank import fit_scales, group_absmax, low_rank_of_groups
from graph.formats.lut import dequantize_lut, fake_quantize_lut
from graph.formats.lut_scales import Factors, dense_scale, not_positive, rows_of, scale_factors
from graph.formats.lut_weight import LatentWeight
from graph.formats.scales import apart_from_zero

Scale = Literal["low-rank", "group", "channel", "none"]

ROUNDING = 4 * torch.finfo(torch.float32).eps
"""What the roundings of fp32 products and quotients come to, as a share of the values."""

FLOOR = 1e-8
"""What scales of a latent weight are held above; where they are not, its gradient is cut off."""


@dataclass(frozen=True, kw_only=True)
class Lut:
    """Weights of so many ``columns`` on ``levels`` levels: ``indices`` u8 [out, bytes] and ``lut`` f32 [levels].

    Scales are ``scale`` f32 [out, groups], or ``scale_a`` f32 [out, rank] and ``scale_b`` f32 [rank, columns], with
    ``scale_g`` f32 [rank] too unless the weight is latent (then ``latent`` is in the place of the indices) or baked.
    """

    parameters: ClassVar[tuple[str, ...]] = ("latent", "lut", "scale", "scale_a", "scale_b", "scale_g")

    columns: int
    levels: int
    scale: Scale = "low-rank"
    rank: int = 32
    group: int = 32
    uniform: bool = False
    fit: Literal["mse", "absmax"] = "mse"
    symmetric: bool = False
    zero_free: bool = False
    latent: bool = False
    magnitudes: bool = True
    """Whether ``scale_g`` holds the magnitudes of low-rank scales; without it they are in ``scale_a``."""

    floor: float | None = None
    fp16: bool = False
    """Whether levels and scales are rounded to fp16 as they are read."""

    baked: bool = False
    """Whether levels and scales are stored in fp16."""

    rows_per_lut: int | None = None
    """Rows that share their levels; None: all."""

    theta: bool = False
    """Whether the graph computes the levels from ``theta``, which trains in their place."""

    @staticmethod
    def of(given: Mapping[str, Any], value: Tensor) -> Lut:
        """The format of a weight [out, in] that an op computes from what it is given, stand-ins for tensors."""
        columns, lut = int(value.shape[1]), given["lut"]
        a, scale = given.get("scale_a"), given.get("scale")
        kind: Scale = "none" if a is None and scale is None else "low-rank" if scale is None else "group"
        rank = int(a.shape[1]) if a is not None else 0
        group = columns // int(scale.shape[1]) if scale is not None else _group_for(columns, rank)
        return Lut(
            columns=columns,
            levels=int(lut.shape[-1]),
            scale="channel" if kind == "group" and group == columns else kind,
            rank=rank,
            group=group,
            latent="latent" in given,
            magnitudes="scale_g" in given,
            floor=given.get("floor"),
            fp16=bool(given.get("fp16", False)),
            baked=lut.dtype == torch.float16,
            rows_per_lut=int(value.shape[0]) // int(lut.shape[0]) if lut.dim() == 2 else None,
        )

    @property
    def name(self) -> str:
        scales = {"low-rank": f"scales of rank {self.rank}", "group": f"groups of {self.group}"}
        said = scales.get(self.scale, f"{self.scale if self.scale == 'none' else 'one'} scale a row")
        return f"lut of {self.levels} levels, {said if self.scale != 'none' else 'no scales'}"

    def problem(self, name: str, shape: tuple[int, ...]) -> QcError | None:
        """Groups have to divide the rows, and no rank can be higher than that of what it comes from."""
        if len(shape) != 2:
            what = f"{name} has the shape {list(shape)}; lut packs weights of two dimensions"
            return QcError(what, fix="exclude it from select")
        rows, columns = shape
        if self.rows_per_lut is not None and rows % self.rows_per_lut:
            what = f"lut.rows_per_lut {self.rows_per_lut} does not divide the {rows} rows of {name}"
            return QcError(what, fix=f"set it to {_divisor(rows, self.rows_per_lut)} or another divisor of {rows}")
        if self.scale in ("low-rank", "group") and columns % self.group:
            what = f"lut.group {self.group} does not divide the {columns} input columns of {name}"
            return QcError(what, fix=f"set it to {_divisor(columns, self.group)} or another divisor of {columns}")
        groups = columns // self.group
        if self.scale == "low-rank" and self.rank > min(rows, groups):
            have = f"{groups} groups of {self.group} columns" if groups < rows else f"{rows} rows"
            what = f"lut.rank {self.rank} is more than the {have} of {name}"
            narrower = f", or lut.group to at most {columns // self.rank}" if self.rank <= min(rows, columns) else ""
            return QcError(what, fix=f"set lut.rank to at most {min(rows, groups)}{narrower}")
        return None

    def pack(self, w: Tensor, moments: Tensor | None = None, covariance: Tensor | None = None) -> dict[str, Tensor]:
        """The side tensors; with a covariance the indices are those of least error at the outputs, not the nearest.

        w: [out, in], float    moments: [in], the inputs' mean squares, or None    covariance: [in, in] or None
        """
        assert w.shape[1] == self.columns, f"a weight of {w.shape[1]} columns in a format of {self.columns}"
        lut, scales = self._fitted(w, moments)
        lut = trainable_levels(lut) if self.theta else lut
        dtype = torch.float16 if self.baked else torch.float32
        sides = {suffix: _own(value, dtype) for suffix, value in {"lut": lut, **scales}.items()}
        if self.latent:
            return {"latent": w, **sides}
        factors = self._factors(sides)
        nearest = LatentWeight(w, lut, factors, self.floor)
        if covariance is not None and has_data(w):
            nearest = self._fed_back(nearest, covariance)
        codes = nearest.all_codes()
        return {"indices": pack_bits(codes, bits_for(self.levels)), **sides}

    def _fed_back(self, nearest: LatentWeight, covariance: Tensor) -> LatentWeight:
        """The levels of least error at the outputs, as a weight without scales."""
        w, lut = nearest.latent, nearest.lut
        s, plain = dense_scale(nearest.factors, self.columns, self.floor), torch.empty(w.shape, device=w.device)
        for part in nearest.parts():
            nearest.levels(part, None if s is None else s[part], plain[part])
        levels = rounded_with_feedback(w, s, levels_by_row(lut, w.shape[0]), covariance, plain)
        return LatentWeight(levels, lut, (), None)

    def _fitted(self, w: Tensor, moments: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Levels, and scales by suffix, for a weight."""
        if self.scale == "none":
            return self._levels(w, None, moments), {}
        group = {"channel": None if self.fit == "mse" else self.columns}.get(self.scale, self.group)
        rank = self.rank if self.scale == "low-rank" else None
        if self.fit == "mse":
            found = fit_scales(
                w,
                self.levels,
                rank=rank,
                group=group,
                moments=moments,
                rows_per_lut=self.rows_per_lut,
                symmetric=self.symmetric,
                zero_free=self.zero_free,
            )
            return found.levels, self._named(found.scale, found.a, found.g, found.b)
        assert group is not None
        scale = group_absmax(w, group)
        parts = (None, None, None) if rank is None else low_rank_of_groups(scale, group, self.columns, rank)
        scales = self._named(scale if rank is None else None, *parts)
        return self._levels(w, dense_scale(self._factors(scales), self.columns, self.floor), moments), scales

    def _levels(self, w: Tensor, s: Tensor | None, moments: Tensor | None) -> Tensor:
        """Levels for ``w / S`` [out, in]: what is off at a weight counts as often as its scale squared."""
        normed = w if s is None else w.float() / apart_from_zero(s)
        step = self.rows_per_lut or w.shape[0]
        found = []
        for start in range(0, w.shape[0], step):
            rows = normed[start : start + step]
            importance = None if s is None else s[start : start + step].square()
            if moments is not None and has_data(w):
                importance = moments.expand_as(rows) if importance is None else importance * moments
            if not self.uniform:
                options = {"symmetric": self.symmetric, "zero_free": self.zero_free}
                found.append(fit_levels(rows, self.levels, importance, **options))
            else:
                largest = max(abs(float(x)) for x in rows.aminmax()) if s is None and has_data(w) else 1.0
                found.append(uniform_levels(self.levels, largest).to(w.device))
        return found[0] if self.rows_per_lut is None else torch.stack(found)

    def _named(self, scale: Tensor | None, a: Tensor | None, g: Tensor | None, b: Tensor | None) -> dict[str, Tensor]:
        """Scales by suffix, with the magnitudes where they belong."""
        if scale is not None:
            return {"scale": scale}
        assert a is not None and g is not None and b is not None
        if self.magnitudes:
            return {"scale_a": a, "scale_b": b, "scale_g": g}
        return {"scale_a": a * g, "scale_b": b}

    def call(self, packed: Mapping[str, V], dtype: torch.dtype) -> Call:
        """``qc.dequantize_lut`` or ``qc.fake_quantize_lut``, and its arguments."""
        scales: dict[str, Any] = {key: value for key, value in packed.items() if key.startswith("scale")}
        said: dict[str, Any] = {} if self.floor is None else {"floor": self.floor}
        said |= {"fp16": True} if self.fp16 else {}
        if self.latent:
            return fake_quantize_lut, (packed["latent"], packed["lut"], dtype), {**scales, **said}
        return dequantize_lut, (packed["indices"], packed["lut"], self.columns, dtype), {**scales, **said}

    def by_row(self, packed: Mapping[str, Tensor]) -> Rows:
        """With magnitudes multiplied into A, whose columns are of length 1 as a whole only."""
        holder = "latent" if self.latent else "indices"
        factors = self._factors(packed)
        rows = packed[holder].shape[0]
        lut = packed["lut"].float()
        by_row = lut.repeat_interleave(rows // lut.shape[0], dim=0) if lut.dim() == 2 else None

        def cut(part: slice) -> dict[str, Tensor]:
            sides = {holder: packed[holder][part], "lut": lut if by_row is None else by_row[part]}
            names = ("scale",) if len(factors) == 1 else ("scale_a", "scale_b")
            return sides | dict(zip(names, rows_of(factors, part), strict=False))

        return cut

    def widest_error(self, w: Tensor, packed: Mapping[str, Tensor], largest: float) -> Tensor:
        """How far the nearest level is, times the scale; a value that is near two levels may be at either."""
        w = w.float()
        nearest = LatentWeight(w, packed["lut"], self._factors(packed), self.floor).dense()
        return (w - nearest).abs_().add_(w.abs().add_(nearest.abs_()), alpha=ROUNDING)

    def _factors(self, packed: Mapping[str, Tensor]) -> Factors:
        scale, a, b, g = (packed.get(key) for key in ("scale", "scale_a", "scale_b", "scale_g"))
        return scale_factors(scale, a, b, g, self.floor, self.fp16)

    def once_baked(self, packed: Mapping[str, Tensor]) -> int:
        """The bytes of a packed weight whose levels and scales are stored in fp16, with the magnitudes in A."""
        sides = sum(2 * value.numel() for key, value in packed.items() if key in self.parameters[1:5])
        rows = packed["latent" if self.latent else "indices"].shape[0]
        return sides + rows * packed_columns(self.columns, bits_for(self.levels))

    def scales_below(self, packed: Mapping[str, Tensor]) -> int:
        """How many of the scales [out, in] are zero or less: they turn a weight's sign, or a floor cuts it off."""
        return not_positive(self._factors(packed), self.columns)


def _own(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in rows: a part of a singular matrix holds on to all of it, and in another order sums round otherwise."""
    return value.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _divisor(whole: int, most: int) -> int:
    """The largest divisor of a number up to another."""
    return next(size for size in range(min(most, whole), 0, -1) if whole % size == 0)


def _group_for(columns: int, rank: int) -> int:
    """Where it is not known, the widest group up to 32 that leaves scales of this rank room."""
    return _divisor(columns, max(1, min(32, columns // max(1, rank))))
