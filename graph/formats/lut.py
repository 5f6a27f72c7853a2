"""LUT weights: a table of a few levels, packed indices into it, and scales: none, by group, or of low rank.

    packed    qc.dequantize_lut(W.indices, W.lut, 1024, model, scale_a=…, scale_b=…, scale_g=…)
    latent    qc.fake_quantize_lut(W.latent, W.lut, model, scale_a=…, scale_b=…, floor=1e-08)

Of a packed weight the indices are all there is; those of a latent one are found each time it is read.

Both compute ``Q * S`` in fp32. Gradients go to whatever of levels and scales is trained, the index taken as constant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from graph.formats.lut_scales import scale_factors
from graph.formats.lut_weight import LatentWeight, LutWeight, PackedWeight
from graph.formats.ste import ste_fp16
from graph.ops import op

Kind = Callable[..., LutWeight]
"""What makes the weight of its indices, or of its latent floats: ``PackedWeight`` or ``LatentWeight``, say."""


@op
def dequantize_lut(
    indices: Tensor,
    lut: Tensor,
    columns: int,
    dtype: torch.dtype,
    scale: Tensor | None = None,
    scale_a: Tensor | None = None,
    scale_b: Tensor | None = None,
    scale_g: Tensor | None = None,
    floor: float | None = None,
    fp16: bool = False,
) -> Tensor:
    """The weight that packed indices stand for: ``lut[index] * S``, rounded once to ``dtype``.

    indices: u8 [out, ceil(columns * bits / 8)]    lut: [N], or [groups, N] where rows share levels by group
    scale: [out, groups]    scale_a: [out, r]    scale_b: [r, columns]    scale_g: [r]  ->  [out, columns]

    S is ``scale`` of each value's group, ``A B`` (with ``floor``: at least that), or with ``scale_g`` the product of
    unit columns, magnitudes and unit rows. ``fp16`` rounds levels and factors as a deployed graph holds them.
    """
    factors = scale_factors(scale, scale_a, scale_b, scale_g, floor, fp16)
    lut = ste_fp16(lut.float()) if fp16 else lut
    if not trains(lut, *factors):
        return PackedWeight(indices, lut, columns, factors, floor).dense().to(dtype)
    return DequantizeLut.apply(indices, lut, columns, floor, PackedWeight, *factors).to(dtype)


def trains(*tensors: Tensor | None) -> bool:
    """Whether a gradient of one of them is wanted."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


class DequantizeLut(torch.autograd.Function):
    """Keeps the packed weight, of this kind, for the backward, and unpacks it again there."""

    @staticmethod
    def forward(
        ctx: Any,
        indices: Tensor,
        lut: Tensor,
        columns: int,
        floor: float | None,
        kind: Kind,
        *factors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(indices, lut, *factors)
        ctx.kind, ctx.columns, ctx.floor = kind, columns, floor
        return kind(indices, lut, columns, factors, floor).dense()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        indices, lut, *factors = ctx.saved_tensors
        needs = (ctx.needs_input_grad[1], *ctx.needs_input_grad[5:])
        d_lut, *d_factors = ctx.kind(indices, lut, ctx.columns, tuple(factors), ctx.floor).gradients(grad, needs)
        return None, d_lut, None, None, None, *d_factors


@op
def fake_quantize_lut(
    latent: Tensor,
    lut: Tensor,
    dtype: torch.dtype,
    scale: Tensor | None = None,
    scale_a: Tensor | None = None,
    scale_b: Tensor | None = None,
    floor: float | None = None,
    fp16: bool = False,
) -> Tensor:
    """A float weight on the grid of its levels and scales, which is found again at every call.

    latent: [out, in]    the rest: as in ``dequantize_lut``  ->  [out, in]

    What trains gets its gradient: the latent weight that of the result (straight through); the scales Q times it. If
    both train, the scales get ``Q - W / S`` times it where ``W / S`` lies between the outermost levels, and Q beyond
    (learned step size, arXiv:1902.08153): there a scale moves the grid under a weight that follows the loss itself.
    """
    factors = scale_factors(scale, scale_a, scale_b, None, floor, fp16)
    lut = ste_fp16(lut.float()) if fp16 else lut
    if not trains(latent, lut, *factors):
        return LatentWeight(latent, lut, factors, floor).dense().to(dtype)
    return FakeQuantizeLut.apply(latent, lut, floor, LatentWeight, *factors).to(dtype)


class FakeQuantizeLut(torch.autograd.Function):
    """Keeps the latent weight, of this kind, for the backward, and finds its levels again there."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, lut: Tensor, floor: float | None, kind: Kind, *factors: Tensor) -> Tensor:
        ctx.save_for_backward(latent, lut, *factors)
        ctx.kind, ctx.floor = kind, floor
        return kind(latent, lut, factors, floor).dense()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        latent, lut, *factors = ctx.saved_tensors
        trained, needs = ctx.needs_input_grad[0], (ctx.needs_input_grad[1], *ctx.needs_input_grad[4:])
        weight = ctx.kind(latent, lut, tuple(factors), ctx.floor, both=trained)
        d_lut, *d_factors = weight.gradients(grad, needs)
        return grad.to(latent.dtype) if trained else None, d_lut, None, None, *d_factors
