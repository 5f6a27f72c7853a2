"""Ternary weights: -1, 0 or 1 times a scale (1.58 bits, arXiv:2402.17764), by channel, by group or one for all.

    latent    qc.fake_quantize_ternary(W.latent, model, dead-zone, 0.1, absmean, 1024)
    packed    qc.dequantize_ternary(W.indices, W.scale, 1024, 2bit, model)

Of a latent weight, threshold and scale are found anew each time it is read, unless it has a ``W.scale`` that trains;
of a packed one the integers and the scales are all there is. Gradients reach the latent weight unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from graph.formats.lut import dequantize_lut, trains
from graph.formats.ternary_rule import Grid, TernaryRule
from graph.formats.trits import pack_trits, unpack_trits
from graph.ops import op


@op
def fake_quantize_ternary(
    latent: Tensor,
    dtype: torch.dtype,
    rule: str,
    tau: float | None,
    fit: str,
    group: int | None,
    scale: Tensor | None = None,
    moments: Tensor | None = None,
) -> Tensor:
    """A float weight on the nearest ternary values by ``rule``, which are found again at every call.

    latent: [out, in]    scale: [out, groups], or [1, 1] where one serves all    moments: [in]  ->  [out, in]

    ``rule``, ``tau``, ``fit`` and ``group`` are those of ``TernaryRule``; with ``scale``, that is what the integers are
    multiplied by, in the place of the fitted one. The latent weight gets the gradient of the result (straight
    through), ``scale`` the integers times it.
    """
    by = TernaryRule.named(rule, tau, fit, group)
    grid = by.fitted(latent.detach(), None if moments is None else moments.detach())
    if not trains(latent, scale):
        return (grid if scale is None else grid.with_scale(scale)).dense(latent).to(dtype)
    return _FakeQuantize.apply(latent, scale, grid).to(dtype)


class _FakeQuantize(torch.autograd.Function):
    """Keeps the latent weight if there is a scale that trains, else nothing."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, scale: Tensor | None, grid: Grid) -> Tensor:
        ctx.latent_dtype = latent.dtype
        ctx.grid = grid
        ctx.save_for_backward(*((latent, scale) if ctx.needs_input_grad[1] else (None, None)))
        return (grid if scale is None else grid.with_scale(scale)).dense(latent)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        latent, scale = ctx.saved_tensors
        d_scale = None if scale is None else ctx.grid.scale_gradient(latent, grad).to(scale.dtype)
        return grad.to(ctx.latent_dtype) if ctx.needs_input_grad[0] else None, d_scale, None


@op
def dequantize_ternary(indices: Tensor, scale: Tensor, columns: int, packing: str, dtype: torch.dtype) -> Tensor:
    """The weight that packed trits stand for: ``(trit - 1) * scale``, computed in fp32 and rounded once to ``dtype``.

    indices: u8 [out, bytes]    scale: [out, groups], or [1, 1]    packing: 2bit or trit5  ->  [out, columns]

    The scales get a gradient where they train.
    """
    rows = indices.shape[0]
    by_row = scale.float().expand(rows, -1)
    return dequantize_lut(two_bits(indices, columns, packing), levels(indices), columns, dtype, scale=by_row)


def two_bits(indices: Tensor, columns: int, packing: str) -> Tensor:
    """The trits as indices of two bits, whatever they are packed as: levels -1, 0 and 1 make them a LUT weight."""
    if packing == "2bit":
        return indices
    assert packing == "trit5", f"no packing is called {packing}"
    return pack_trits(unpack_trits(indices, "trit5", columns), "2bit")


def levels(indices: Tensor) -> Tensor:
    """What trits stand for, f32 [3]."""
    return torch.tensor([-1.0, 0.0, 1.0], device=indices.device)
