"""Linears over ternary weights that train, and keep no dense weight that is larger than what they read and make.

    before    linear(x, qc.fake_quantize_ternary(W.latent, model, dead-zone, 0.1, absmean, 1024), bias)
    training  qc.linear_fake_ternary(x, W.latent, model, dead-zone, 0.1, absmean, 1024, bias=bias)

Values and gradients are bit-identical.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from graph.formats.format import has_data
from graph.formats.lut import trains
from graph.formats.lut_linear import KEPT, bias_gradient, linear_lut, times_weight, weight_gradient
from graph.formats.memory import scratch
from graph.formats.ternary import levels, two_bits
from graph.formats.ternary_rule import Grid, TernaryRule
from graph.ops import op


@op
def linear_ternary(
    x: Tensor,
    indices: Tensor,
    scale: Tensor,
    columns: int,
    packing: str,
    dtype: torch.dtype,
    bias: Tensor | None = None,
) -> Tensor:
    """``x`` times a packed ternary weight, which is unpacked for the product and again for its backward.

    x: [..., in]    bias: [out]    the rest: as in ``dequantize_ternary``  ->  [..., out]
    """
    by_row = scale.float().expand(indices.shape[0], -1)
    packed = two_bits(indices, columns, packing)
    return linear_lut(x, packed, levels(indices), columns, dtype, scale=by_row, bias=bias)


@op
def linear_fake_ternary(
    x: Tensor,
    latent: Tensor,
    dtype: torch.dtype,
    rule: str,
    tau: float | None,
    fit: str,
    group: int | None,
    scale: Tensor | None = None,
    moments: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``x`` times a latent weight made ternary, for the product and, unless that is kept, again for its backward.

    x: [..., in]    bias: [out]    the rest: as in ``fake_quantize_ternary``  ->  [..., out]
    """
    by, kept = TernaryRule.named(rule, tau, fit, group), _is_kept(x, latent) and trains(x)
    dense = latent.new_empty(latent.shape, dtype=torch.float32) if kept else _room(latent)
    grid = by.fitted(latent.detach(), moments, dense if scale is None else None)
    if scale is not None:
        grid = grid.with_scale(scale)
        grid.dense(latent.detach(), dense)
    if not trains(x, bias, latent, scale):
        return _product(x, dense, dtype, bias)
    return _LinearFakeTernary.apply(x, bias, latent, scale, grid, dense, dtype, kept)


class _LinearFakeTernary(torch.autograd.Function):
    """Keeps x, the latent weight, the thresholds and scales that were found for it, and what it became if told to."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        latent: Tensor,
        scale: Tensor | None,
        grid: Grid,
        dense: Tensor,
        dtype: torch.dtype,
        kept: bool,
    ) -> Tensor:
        ctx.save_for_backward(x if any(ctx.needs_input_grad[2:4]) else None, latent, dense if kept else None)
        ctx.grid, ctx.dtype, ctx.x_dtype = grid, dtype, x.dtype
        ctx.scale_dtype = None if scale is None else scale.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _product(x, dense, dtype, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, latent, dense = ctx.saved_tensors
        d_x = d_latent = d_scale = None
        if ctx.needs_input_grad[0]:
            d_x = times_weight(grad, ctx.grid.dense(latent, _room(latent)) if dense is None else dense, ctx)
        if x is not None:
            d_w = weight_gradient(grad, x)
            d_latent = d_w.to(latent.dtype) if ctx.needs_input_grad[2] else None
            d_scale = ctx.grid.scale_gradient(latent, d_w).to(ctx.scale_dtype) if ctx.needs_input_grad[3] else None
        return d_x, bias_gradient(ctx, grad), d_latent, d_scale, None, None, None, None


def _product(x: Tensor, dense: Tensor, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
    return linear(x, dense.to(dtype).to(x.dtype), bias)


def _is_kept(x: Tensor, latent: Tensor) -> bool:
    """Whether the dense weight waits for the backward: it is then less than the rows that wait there anyway."""
    rows = x.numel() // x.shape[-1]
    return latent.numel() <= rows * sum(latent.shape)


def _room(latent: Tensor) -> Tensor:
    """Where a dense weight lies while it is multiplied with: in memory that is kept, unless it is very large."""
    if math.prod(latent.shape) > KEPT or not has_data(latent):
        return latent.new_empty(latent.shape, dtype=torch.float32)
    return scratch("ternary dense", tuple(latent.shape), torch.float32, latent.device)
