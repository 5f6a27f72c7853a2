"""Codes times scales: FP8, MXFP8, NVFP4, MXFP4 and integers of 2 to 8 bits, as GPU servers read them.

    W = code * scale              of its row, its group of columns, its block of rows and columns, or the whole weight
    W = code * scale / global     NVFP4

The bytes are those of compressed-tensors, given an fp32 weight and what shares a scale (elements.py, scales_of.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from graph.errors import QcError
from graph.formats.elements import E2M1, E4M3, Element, integers
from graph.formats.format import Call, Rows, V, has_data
from graph.formats.scaled_parts import Fused, nearest, pack, pack_with_feedback
from graph.formats.scales_of import (
    e4m3_scales,
    e8m0_scales,
    float_scales,
    global_scale,
    magnitudes,
    read_scales,
    scales_by_row,
    small_chunks,
)
from graph.ops import op

Kind: TypeAlias = Literal["fp8", "mxfp8", "nvfp4", "mxfp4", "int2", "int3", "int4", "int6", "int8"]

ELEMENTS: dict[str, Element] = {"fp8": E4M3, "mxfp8": E4M3, "nvfp4": E2M1, "mxfp4": E2M1} | {
    f"int{bits}": integers(bits) for bits in (2, 3, 4, 6, 8)
}
"""The numbers of each kind."""

FIXED: dict[str, int] = {"mxfp8": 32, "mxfp4": 32, "nvfp4": 16}
"""The columns that share a scale, of the kinds that leave no choice."""


SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Scaled:
    """Weights of ``kind``: ``indices`` u8 [out, in * bits / 8] and ``scale`` [out / rows, in / columns].

    Scales are f32, bf16 or fp16; of NVFP4 e4m3 and of MX e8m0, both held as u8. NVFP4 has ``global_scale``, f32 [1].
    """

    parameters: ClassVar[tuple[str, ...]] = ("latent",)

    kind: Kind
    rows: int = 1
    """Rows that share a scale; 0: all."""

    columns: int = 0
    """Columns that share a scale; 0: all."""

    scale_dtype: torch.dtype = torch.float32
    """Of the kinds that have float scales. Codes belong to the scale as it is rounded."""

    largest: float | None = None
    """Where one number scales the whole weight: the largest magnitude of all weights that share it; without it, that of
    the weight."""

    latent: bool = False
    """Float weights, ``latent`` [out, in], that are packed anew each time they are read: they train."""

    def __post_init__(self) -> None:
        assert self.kind in get_args(Kind) and self.scale_dtype in SCALE_DTYPES, str(self)
        if self.kind in FIXED:
            assert self.rows == 1 and self.columns in (0, FIXED[self.kind]), str(self)
            object.__setattr__(self, "columns", FIXED[self.kind])

    @property
    def element(self) -> Element:
        """The numbers that it counts in."""
        return ELEMENTS[self.kind]

    @property
    def whole(self) -> bool:
        """Whether one number scales the whole weight, as NVFP4's global scale does."""
        return self.kind == "nvfp4" or (self.rows, self.columns) == (0, 0)

    @property
    def stored_scale(self) -> torch.dtype:
        """The numbers that its scales are, whatever holds them."""
        if self.kind == "nvfp4":
            return torch.float8_e4m3fn
        return torch.float8_e8m0fnu if self.kind in FIXED else self.scale_dtype

    @property
    def packing(self) -> Scaled:
        """The format that latent weights are packed in."""
        return replace(self, latent=False)

    @property
    def name(self) -> str:
        if self.kind in FIXED:
            return self.kind
        if (self.rows, self.columns) in ((1, 0), (0, 0)):
            return f"{self.kind}, one scale a {'row' if self.rows else 'weight'}"
        shared = f"{self.rows}x{self.columns}" if self.rows != 1 else str(self.columns)
        return f"{self.kind}, blocks of {shared}"

    def problem(self, name: str, shape: tuple[int, ...]) -> QcError | None:
        """Blocks may not run over the end of a weight, nor may a row end within a byte."""
        if len(shape) != 2:
            what = f"{name} has the shape {list(shape)}; {self.kind} packs weights of two dimensions"
            return QcError(what, fix="exclude it from select")
        for block, size, what in ((self.columns, shape[1], "input columns"), (self.rows, shape[0], "output rows")):
            if block and size % block:
                fix = "exclude it from select" + ("" if self.kind in FIXED else ", or take another block")
                return QcError(f"{self.name}: {block} does not divide the {size} {what} of {name}", fix=fix)
        if shape[1] * self.element.bits % 8:
            what = f"a row of {name} has {shape[1]} weights, which in {self.kind} fill no whole number of bytes"
            return QcError(what, fix="exclude it from select")
        return None

    def pack(self, w: Tensor, covariance: Tensor | None = None) -> dict[str, Tensor]:
        """The side tensors, as in the class; with a covariance codes are those of least error at the outputs.

        w: [out, in], float    covariance: f32 [in, in], the inputs' mean products, or None
        """
        assert self.problem("the weight", tuple(w.shape)) is None, "see problem()"
        if self.latent:
            return {"latent": w}
        return pack(self, w) if covariance is None else pack_with_feedback(self, w, covariance)

    def scales(self, w: Tensor) -> dict[str, Tensor]:
        """The side tensors but for the codes."""
        largest = magnitudes(w, self.columns or w.shape[1])
        if self.rows != 1:
            largest = largest.unflatten(0, (-1, self.rows or w.shape[0])).amax(1)
        shared = None if self.largest is None or not has_data(w) else torch.tensor(self.largest, device=w.device)
        if self.kind == "nvfp4":
            divisor = global_scale(largest.amax() if shared is None else shared)
            if not has_data(w):
                return {"scale": largest.to(torch.uint8), "global_scale": divisor}
            return {"scale": e4m3_scales(largest, divisor), "global_scale": divisor}
        if self.kind in FIXED:
            return {"scale": e8m0_scales(largest, self.element) if has_data(w) else largest.to(torch.uint8)}
        largest = largest if shared is None else shared.reshape(1, 1)
        return {"scale": float_scales(largest, self.element, self.scale_dtype)}

    def call(self, packed: Mapping[str, V], dtype: torch.dtype) -> Call:
        """``qc.dequantize_scaled``, or ``qc.fake_quantize_scaled`` of latent weights, and its arguments."""
        if "latent" in packed:
            return fake_quantize_scaled, (packed["latent"], self.kind, self.rows, self.columns, dtype), self._said()
        rest = {"global_scale": packed["global_scale"]} if "global_scale" in packed else {}
        return dequantize_scaled, (packed["indices"], packed["scale"], self.kind, dtype), rest

    def _said(self) -> dict[str, Any]:
        return {"scale_dtype": self.scale_dtype} if self.scale_dtype is not torch.float32 else {}

    def by_row(self, packed: Mapping[str, Tensor]) -> Rows:
        """With the scales of each row; a latent weight is packed as a whole."""
        if self.latent:
            packed = self.packing.pack(packed["latent"])
            return self.packing.by_row(packed)
        indices, rest = packed["indices"], {key: side for key, side in packed.items() if key == "global_scale"}
        per_row = scales_by_row(packed["scale"], indices.shape[0])
        return lambda part: {"indices": indices[part], "scale": per_row(part), **rest}

    def widest_error(self, w: Tensor, packed: Mapping[str, Tensor], largest: float) -> Tensor:
        """Half the widest step, times the scale; where a scale was rounded down the largest value saturates.

        Below the smallest normal number an e4m3 scale is off by up to ``2^-10``, however small it is.
        """
        divisor = packed.get("global_scale")
        scale = read_scales(packed["scale"], divisor)
        stored = packed["scale"].dtype
        allowed = scale * self.element.half_gap
        if stored.is_floating_point:  # the largest value is off by as much as its scale, times itself
            numbers = torch.finfo(stored)
            allowed = allowed + self.element.largest * numbers.eps * scale.clamp_min(numbers.smallest_normal)
        return allowed if divisor is None else torch.maximum(allowed, self.element.largest * 2.0**-10 / divisor)


def format_of_scaled(kind: Kind, indices: Tensor, scale: Tensor) -> Scaled:
    """The format that such side tensors have."""
    if kind in FIXED:
        return Scaled(kind)
    shape = (indices.shape[0], indices.shape[1] * 8 // ELEMENTS[kind].bits)
    rows, columns = (0 if count == 1 else size // count for size, count in zip(shape, scale.shape, strict=True))
    return Scaled(kind, rows, columns, scale.dtype)


@op
def fake_quantize_scaled(
    latent: Tensor,
    kind: Kind,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    scale_dtype: torch.dtype = torch.float32,
    fused: list[Tensor | float] | None = None,
) -> Tensor:
    """What ``latent`` would unpack to if it were packed now, rounded once to ``dtype``. Its gradient passes through.

    Where one number scales a whole weight, it is the same for ``latent`` and all of ``fused``, the other weights that a
    server multiplies with it, or their largest magnitudes.

    latent: [out, in]  ->  [out, in]
    """
    return _FakeQuantizeScaled.apply(latent, Scaled(kind, rows, columns, scale_dtype), dtype, fused)


class _FakeQuantizeScaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latent: Tensor, form: Scaled, dtype: torch.dtype, fused: Fused) -> Tensor:
        ctx.dtype = latent.dtype
        return nearest(form, latent, dtype, fused)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad.to(ctx.dtype), None, None, None


@op
def dequantize_scaled(
    indices: Tensor, scale: Tensor, kind: Kind, dtype: torch.dtype, global_scale: Tensor | None = None
) -> Tensor:
    """The weight that codes stand for: ``code * scale (/ global_scale)`` in fp32, rounded once to ``dtype``.

    indices: u8 [out, in * bits / 8]    scale: [out / rows, in / columns]    global_scale: f32 [1]  ->  [out, in]
    """
    element = ELEMENTS[kind]
    dense = indices.new_empty((indices.shape[0], indices.shape[1] * 8 // element.bits), dtype=dtype)
    if has_data(indices):
        per_row = scales_by_row(read_scales(scale, global_scale), dense.shape[0])
        for part in small_chunks(*dense.shape):
            by_row = per_row(part)
            values = element.decode(indices[part]).unflatten(1, (by_row.shape[1], -1))
            torch.mul(values, by_row[..., None], out=values)
            dense[part] = values.flatten(1)
    return dense
