"""The format of LUT weights whose indices stand for vectors: what table and scales a weight gets, how it is packed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from graph.errors import QcError
from graph.formats.bits import bits_for, pack_bits, packed_columns
from graph.formats.feedback import Pick, rounded_with_feedback
from graph.formats.format import Call, Rows, V, has_data
from graph.formats.lut_scales import Factors, not_positive, rows_of, scale_factors
from graph.formats.scales import apart_from_zero
from graph.formats.ste import to_fp16
from graph.formats.vector_fit import FittedVectors, fit_vectors
from graph.formats.vector_lut import dequantize_vector_lut, fake_quantize_vector_lut
from graph.formats.vector_weight import LatentVectors, nearest_vectors, spread

WIDTHS = (2, 4, 8, 16)
"""Values of a vector."""

LARGEST_TABLE = 256
"""Numbers of a table; what the Neural Engine keeps (lint rule W2)."""

ROUNDING = 4 * torch.finfo(torch.float32).eps
"""What the roundings of fp32 products come to, as a share of squared values."""


@dataclass(frozen=True, kw_only=True)
class VectorLut:
    """Weights of so many ``columns`` on ``levels`` vectors: ``indices`` u8 [out / V, bytes], ``lut`` f32 [levels, V].

    Rows may have a ``scale`` f32 [out, 1] each. Of a latent weight ``latent`` is in the place of the indices.
    """

    parameters: ClassVar[tuple[str, ...]] = ("latent", "lut", "scale")

    columns: int
    levels: int
    vector: int
    """V, the rows that a vector lies in."""

    scale: Literal["channel", "none"] = "channel"
    zero_free: bool = True
    latent: bool = False
    fp16: bool = False
    """Whether table and scales are rounded to fp16 as they are read."""

    baked: bool = False
    """Whether they are stored in fp16."""

    @staticmethod
    def of(given: Mapping[str, Any], value: Tensor) -> VectorLut:
        """The format of a weight [out, in] that an op computes from what it is given, stand-ins for tensors."""
        lut = given["lut"]
        return VectorLut(
            columns=int(value.shape[1]),
            levels=int(lut.shape[0]),
            vector=int(lut.shape[1]),
            scale="channel" if "scale" in given else "none",
            latent="latent" in given,
            fp16=bool(given.get("fp16", False)),
            baked=lut.dtype == torch.float16,
        )

    @property
    def name(self) -> str:
        return f"lut of {self.levels} vectors of {self.vector}, {'one scale a row' if self._scaled else 'no scales'}"

    @property
    def _scaled(self) -> bool:
        return self.scale == "channel"

    def problem(self, name: str, shape: tuple[int, ...]) -> QcError | None:
        """Vectors lie one behind the other along the outputs."""
        if len(shape) != 2:
            what = f"{name} has the shape {list(shape)}; lut packs weights of two dimensions"
            return QcError(what, fix="exclude it from select")
        if shape[0] % self.vector:
            what = f"lut.vector {self.vector} does not divide the {shape[0]} rows of {name}"
            fits = [width for width in WIDTHS if shape[0] % width == 0]
            return QcError(what, fix=f"set it to {fits[-1]}, or exclude it" if fits else "exclude it from select")
        return None

    def pack(self, w: Tensor, moments: Tensor | None = None, covariance: Tensor | None = None) -> dict[str, Tensor]:
        """The side tensors; with a covariance the indices are those of least error at the outputs, not the nearest.

        w: [out, in], float    moments: [in], the inputs' mean squares, or None    covariance: [in, in] or None
        """
        assert w.shape[1] == self.columns, f"a weight of {w.shape[1]} columns in a format of {self.columns}"
        found = fit_vectors(w, self.levels, self.vector, scaled=self._scaled, moments=moments, zero_free=self.zero_free)
        return self._packed(w, found, covariance)

    def moved(self, w: Tensor, packed: Mapping[str, Tensor], moments: Tensor | None = None) -> dict[str, Tensor]:
        """The side tensors of a weight w [out, in] near that of ``packed``, from whose table and scales it goes on."""
        held = packed.get("scale")
        start = packed["lut"].detach().float(), None if held is None else held.detach().float()
        found = fit_vectors(w, self.levels, self.vector, scaled=self._scaled, moments=moments, start=start)
        return self._packed(w, found)

    def nearest(self, w: Tensor, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The side tensors of another weight w [out, in], with the table and the scales of ``packed``."""
        sides = {key: packed[key].detach() for key in ("lut", "scale") if key in packed}
        latent = {"latent": w.detach(), **sides}
        return latent if self.latent else replace(self, latent=True).freeze(latent)[1]

    def _packed(self, w: Tensor, found: FittedVectors, covariance: Tensor | None = None) -> dict[str, Tensor]:
        dtype = torch.float16 if self.baked else torch.float32
        sides = {"lut": found.table.to(dtype)} | ({} if found.scale is None else {"scale": found.scale.to(dtype)})
        if self.latent:
            return {"latent": w, **sides}
        if covariance is not None and has_data(w):
            codes = self._fed_back(w, found, covariance)
        elif self.baked:  # the nearest are those of the rounded scales
            codes = LatentVectors(w.detach(), sides["lut"], self._factors(sides), None).all_codes()
        else:
            codes = found.codes
        return {"indices": pack_bits(codes, bits_for(self.levels)), **sides}

    def _fed_back(self, w: Tensor, found: FittedVectors, covariance: Tensor) -> Tensor:
        """The indices of least error at the outputs, u8 [out / V, in]."""
        s = None if found.scale is None else found.scale.expand(-1, self.columns)
        nearest = spread(found.codes, found.table, torch.empty(w.shape, device=w.device))
        pick = _picks_vectors(found.table, None if found.scale is None else apart_from_zero(found.scale))
        values = rounded_with_feedback(w, s, pick, covariance, nearest, together=self.vector)
        return nearest_vectors(values, None, found.table)

    def call(self, packed: Mapping[str, V], dtype: torch.dtype) -> Call:
        """``qc.dequantize_vector_lut`` or ``qc.fake_quantize_vector_lut``, and its arguments."""
        said: dict[str, Any] = {key: packed[key] for key in ("scale",) if key in packed}
        said |= {"fp16": True} if self.fp16 else {}
        if self.latent:
            return fake_quantize_vector_lut, (packed["latent"], packed["lut"], dtype), said
        return dequantize_vector_lut, (packed["indices"], packed["lut"], self.columns, dtype), said

    def by_row(self, packed: Mapping[str, Tensor]) -> Rows:
        """Cut where no vector is parted, as ``format.chunks`` does."""
        holder, width = ("latent", 1) if self.latent else ("indices", self.vector)
        factors = self._factors(packed)

        def cut(part: slice) -> dict[str, Tensor]:
            start, stop, _ = part.indices(packed[holder].shape[0] * width)
            assert start % self.vector == stop % self.vector == 0, f"rows {start} to {stop} part a vector"
            sides = {holder: packed[holder][start // width : stop // width], "lut": packed["lut"]}
            return sides | dict(zip(("scale",), rows_of(factors, part), strict=False))

        return cut

    def widest_error(self, w: Tensor, packed: Mapping[str, Tensor], largest: float) -> Tensor:
        """How far the nearest vector is, all its values together; of two that are as near it may be either."""
        w = w.float()
        near = LatentVectors(w, packed["lut"], self._factors(packed), None).dense()
        squares = (w - near).square_().add_(w.abs().add_(near.abs()).square_(), alpha=ROUNDING)
        of_vector = squares.view(-1, self.vector, self.columns).sum(1, keepdim=True).sqrt_()
        return of_vector.expand(-1, self.vector, -1).reshape(w.shape)

    def _factors(self, packed: Mapping[str, Tensor]) -> Factors:
        with torch.no_grad():
            return scale_factors(packed.get("scale"), None, None, None, None, self.fp16)

    def once_baked(self, packed: Mapping[str, Tensor]) -> int:
        """The bytes of a packed weight whose table and scales are stored in fp16."""
        sides = sum(2 * packed[key].numel() for key in ("lut", "scale") if key in packed)
        rows = packed["latent"].shape[0] // self.vector if self.latent else packed["indices"].shape[0]
        return sides + rows * packed_columns(self.columns, bits_for(self.levels))

    def scales_below(self, packed: Mapping[str, Tensor]) -> int:
        """How many of the scales, counted once a weight, are zero or less."""
        return not_positive(self._factors(packed), self.columns)

    def freeze(self, packed: Mapping[str, Tensor]) -> tuple[VectorLut, dict[str, Tensor]]:
        """A latent weight with the indices that it has now. Exact."""
        assert self.latent, "indices are frozen already"
        lut = to_fp16(packed["lut"].detach().float()) if self.fp16 else packed["lut"].detach()
        weight = LatentVectors(packed["latent"].detach(), lut, self._factors(packed), None)
        sides = {key: value for key, value in packed.items() if key != "latent"}
        return replace(self, latent=False), {"indices": pack_bits(weight.all_codes(), bits_for(self.levels)), **sides}

    def bake(self, packed: Mapping[str, Tensor]) -> tuple[VectorLut, dict[str, Tensor]]:
        """As a device holds it: table and scales in fp16, the indices untouched."""
        assert not self.latent, "freeze it first"
        sides = {key: to_fp16(packed[key].detach().float()).half() for key in ("lut", "scale") if key in packed}
        return replace(self, baked=True), {"indices": packed["indices"], **sides}


def _picks_vectors(table: Tensor, scale: Tensor | None) -> Pick:
    """Picks the values of the nearest vectors to a column of a weight over its scales, f32 [out]  ->  f32 [out]."""

    def pick(x: Tensor) -> Tensor:
        column = x[:, None] if scale is None else x[:, None] * scale
        return spread(nearest_vectors(column, scale, table), table, torch.empty_like(column))[:, 0]

    return pick
