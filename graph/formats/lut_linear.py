"""Linears over LUT weights: two that train and never keep the dense weight, and the one that a device runs.

    before    linear(x, qc.dequantize_lut(W.indices, W.lut, 1024, model, scale_a=…, scale_b=…, scale_g=…), bias)
    training  qc.linear_lut(x, W.indices, W.lut, 1024, model, scale_a=…, scale_b=…, scale_g=…, bias=bias)
    deployed  qc.linear_lut_factored(x, W.indices, W.lut, 1024, W.scale_a, W.scale_b, W.scale_g, bias)

Training multiplies once with ``Q * S``. A device that holds Q as a palette multiplies once a rank:
``y = sum_k a_k * (Q (b_k * x))``. In exact numbers that is the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from graph.formats.bits import look_up
from graph.formats.format import has_data
from graph.formats.lut import Kind, trains
from graph.formats.lut_scales import Factors, scale_factors
from graph.formats.lut_weight import LatentWeight, LutWeight, PackedWeight
from graph.formats.memory import scratch
from graph.formats.ste import ste_fp16, without_autocast
from graph.ops import op

KEPT = 1 << 24
"""Values up to which the memory of a dense weight is kept from one product to the next."""

TOKENS_AT_ONCE = 1 << 19
"""Values of one intermediate, [tokens, ranks, columns], that the factored form works on at a time."""


@op
def linear_lut(
    x: Tensor,
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
    bias: Tensor | None = None,
) -> Tensor:
    """``x`` times a LUT weight, which is unpacked for the product and again for its backward.

    x: [..., in]    bias: [out]    the rest: as in ``dequantize_lut``  ->  [..., out]
    """
    factors = scale_factors(scale, scale_a, scale_b, scale_g, floor, fp16)
    lut = ste_fp16(lut.float()) if fp16 else lut
    if not trains(x, bias, lut, *factors):
        return product(x, PackedWeight(indices, lut, columns, factors, floor), dtype, bias)
    return LinearLut.apply(x, bias, indices, lut, columns, dtype, floor, PackedWeight, *factors)


class LinearLut(torch.autograd.Function):
    """Keeps x and the packed weight, of this kind."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        indices: Tensor,
        lut: Tensor,
        columns: int,
        dtype: torch.dtype,
        floor: float | None,
        kind: Kind,
        *factors: Tensor,
    ) -> Tensor:
        wanted = any(ctx.needs_input_grad[i] for i in (3, *range(8, 8 + len(factors))))
        ctx.save_for_backward(x if wanted else None, indices, lut, *factors)
        ctx.kind, ctx.columns, ctx.dtype, ctx.floor, ctx.x_dtype = kind, columns, dtype, floor, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return product(x, kind(indices, lut, columns, factors, floor), dtype, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, indices, lut, *factors = ctx.saved_tensors
        needs = (ctx.needs_input_grad[3], *ctx.needs_input_grad[8:])
        weight = ctx.kind(indices, lut, ctx.columns, tuple(factors), ctx.floor)
        d_weight: tuple[Tensor | None, ...] = (None,) * len(needs)
        room = _room(weight)
        if any(needs):
            dense = weight_gradient(
                grad, x, room
            )  # the gradient of the weight, until the weight itself is written over it
            d_weight = weight.gradients(dense, needs, dense if ctx.needs_input_grad[0] else None)
        elif ctx.needs_input_grad[0]:
            dense = weight.dense(room)
        d_x = times_weight(grad, dense, ctx) if ctx.needs_input_grad[0] else None
        return d_x, bias_gradient(ctx, grad), None, d_weight[0], None, None, None, None, *d_weight[1:]


def product(x: Tensor, weight: LutWeight, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
    """``x`` times the weight itself, which is unpacked for it."""
    return linear(x, weight.dense(_room(weight)).to(dtype).to(x.dtype), bias)


def _room(weight: LutWeight) -> Tensor | None:
    """Where a dense weight lies while it is multiplied with: in memory that is kept, unless it is very large."""
    if weight.shape[0] * weight.shape[1] > KEPT or not has_data(weight.lut):
        return None
    return scratch("lut dense", weight.shape, torch.float32, weight.lut.device)


def times_weight(grad: Tensor, dense: Tensor, ctx: Any) -> Tensor:
    """The gradient of x; under autocast the product was in the dtype of ``grad``, not in that of x."""
    return torch.matmul(grad, dense.to(ctx.dtype).to(grad.dtype)).to(ctx.x_dtype)


def weight_gradient(grad: Tensor, x: Tensor, room: Tensor | None = None) -> Tensor:
    """The gradient of a dense weight, f32 [out, in]; the product is in the dtype of ``grad``."""
    rows, columns = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1]).to(grad.dtype)
    if room is not None and grad.dtype == torch.float32:
        with without_autocast(x):
            return torch.mm(rows.t(), columns, out=room)
    return torch.mm(rows.t(), columns).float()


def bias_gradient(ctx: Any, grad: Tensor) -> Tensor | None:
    if not ctx.needs_input_grad[1]:
        return None
    return grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)


@op
def linear_fake_lut(
    x: Tensor,
    latent: Tensor,
    lut: Tensor,
    dtype: torch.dtype,
    scale: Tensor | None = None,
    scale_a: Tensor | None = None,
    scale_b: Tensor | None = None,
    floor: float | None = None,
    fp16: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
    """``x`` times a latent weight on its grid, which is found for the product and again for its backward.

    x: [..., in]    bias: [out]    the rest: as in ``fake_quantize_lut``  ->  [..., out]
    """
    factors = scale_factors(scale, scale_a, scale_b, None, floor, fp16)
    lut = ste_fp16(lut.float()) if fp16 else lut
    if not trains(x, bias, latent, lut, *factors):
        return product(x, LatentWeight(latent, lut, factors, floor), dtype, bias)
    return LinearFakeLut.apply(x, bias, latent, lut, dtype, floor, LatentWeight, *factors)


class LinearFakeLut(torch.autograd.Function):
    """Keeps x, the latent weight, of this kind, and its scales."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        latent: Tensor,
        lut: Tensor,
        dtype: torch.dtype,
        floor: float | None,
        kind: Kind,
        *factors: Tensor,
    ) -> Tensor:
        wanted = any(ctx.needs_input_grad[i] for i in (2, 3, *range(7, 7 + len(factors))))
        ctx.save_for_backward(x if wanted else None, latent, lut, *factors)
        ctx.kind, ctx.dtype, ctx.floor, ctx.x_dtype = kind, dtype, floor, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return product(x, kind(latent, lut, factors, floor), dtype, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, latent, lut, *factors = ctx.saved_tensors
        trained, needs = ctx.needs_input_grad[2], (ctx.needs_input_grad[3], *ctx.needs_input_grad[7:])
        weight = ctx.kind(latent, lut, tuple(factors), ctx.floor, both=trained)
        d_w = weight_gradient(grad, x) if trained or any(needs) else None
        d_weight: tuple[Tensor | None, ...] = (None,) * len(needs)
        d_x = None
        if d_w is not None and any(needs) and ctx.needs_input_grad[0]:
            dense = torch.empty_like(d_w)
            d_weight = weight.gradients(d_w, needs, dense)
            d_x = times_weight(grad, dense, ctx)
        elif d_w is not None and any(needs):
            d_weight = weight.gradients(d_w, needs)
        elif ctx.needs_input_grad[0]:
            d_x = times_weight(grad, weight.dense(_room(weight)), ctx)
        d_latent = d_w.to(latent.dtype) if d_w is not None and trained else None
        return d_x, bias_gradient(ctx, grad), d_latent, d_weight[0], None, None, None, *d_weight[1:]


@op
def linear_lut_factored(
    x: Tensor,
    indices: Tensor,
    lut: Tensor,
    columns: int,
    scale_a: Tensor,
    scale_b: Tensor,
    scale_g: Tensor | None = None,
    bias: Tensor | None = None,
    fp16: bool = False,
) -> Tensor:
    """``x`` times a LUT weight with low-rank scales, one multiplication with Q a rank: ``sum_k a_k * (Q (b_k * x))``.

    x: [..., columns]    bias: [out]    the rest: as in ``dequantize_lut``  ->  [..., out]

    With ``fp16``, R rounds to fp16: ``u = R(x b_k)``, ``v = R(Q u)``, ``y = R(sum_k a_k v)``, ``R(y + R(bias))``; sums
    are in fp32. x is not rounded; it should be fp16 numbers already.
    """
    factors = scale_factors(None, scale_a, scale_b, scale_g, None, fp16)
    q = _Levels.apply(indices, ste_fp16(lut.float()) if fp16 else lut, columns)
    rows = x.reshape(-1, columns).float()
    step = max(1, TOKENS_AT_ONCE // (scale_a.shape[1] * max(q.shape)))
    with without_autocast(x):
        y = torch.cat([_by_rank(part, q, factors, fp16) for part in rows.split(step)])
    if bias is not None:
        y = _rounded(y + _rounded(bias.float(), fp16), fp16)
    return y.view(*x.shape[:-1], q.shape[0]).to(x.dtype)


class _Levels(torch.autograd.Function):
    """``look_up`` with a gradient for the levels."""

    @staticmethod
    def forward(ctx: Any, indices: Tensor, lut: Tensor, columns: int) -> Tensor:
        ctx.save_for_backward(indices, lut)
        ctx.columns = columns
        return look_up(indices, lut, columns)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        indices, lut = ctx.saved_tensors
        return None, *PackedWeight(indices, lut, ctx.columns, (), None).gradients(grad, [ctx.needs_input_grad[1]]), None


def _by_rank(x: Tensor, q: Tensor, factors: Factors, fp16: bool) -> Tensor:
    """x: [tokens, in]    q: [out, in]  ->  [tokens, out]."""
    a, b = factors
    u = _rounded(x[:, None, :] * b, fp16)
    v = _rounded(torch.matmul(u, q.t()), fp16)
    return _rounded(torch.einsum("tko,ok->to", v, a), fp16)


def _rounded(x: Tensor, fp16: bool) -> Tensor:
    return ste_fp16(x) if fp16 else x
