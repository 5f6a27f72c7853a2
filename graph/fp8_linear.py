"""A linear whose three matrix products are of FP8 numbers while it trains, as an op.

    y  = (x8 W8^T) s_x s_W       x8 = e4m3(x / s_x), W8 = e4m3(W / s_W)
    dx = (g8 W8)   s_g s_W       g8 = e5m2(g / s_g), or e4m3 where a row shares its scale
    dW = (g8^T x8) s_g s_x

Scales are the largest magnitude of a tensor, or of each row of a factor, over that of the type: worked out anew in
every step (P. Micikevicius et al., arXiv:2209.05433). Devices without FP8 units multiply the same numbers in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, pad

from graph.ops import op

MULTIPLE = 16
"""FP8 units multiply blocks of so many rows and columns."""

FIRST = (8, 9)
"""The compute capability from which on a GPU has them."""

LEAST = 1e-12
"""The largest magnitude of a factor that is all zeros."""


@op
def linear_fp8(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, training: bool = False, scaling: str = "tensorwise"
) -> Tensor:
    """``x W^T + bias``, of FP8 numbers while training and as it is otherwise.

    x: [..., in]    weight: [out, in]    bias: [out] or None  ->  [..., out]; in and out are multiples of 16

    ``scaling`` is ``tensorwise`` or ``rowwise``. Under autocast x is cast as a linear would.
    """
    if not training or x.is_meta or x.numel() == 0:
        return linear(x, weight, bias)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    y: Tensor = _Fp8Products.apply(x.flatten(0, -2), weight, scaling == "rowwise")
    y = y.unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias.to(y.dtype)


def multiplies_fp8(device: torch.device) -> bool:
    """Whether a device has FP8 units."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FIRST


class _Fp8Products(torch.autograd.Function):
    """What is kept for the backward are x and W as they came: a transposed factor has other rows, and other scales."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, by_row: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.by_row = by_row
        return _product(x, weight, torch.float8_e4m3fn, by_row)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        kind = torch.float8_e4m3fn if ctx.by_row else torch.float8_e5m2
        wanted = ctx.needs_input_grad
        d_x = _product(grad, weight.t(), kind, ctx.by_row) if wanted[0] else None
        d_weight = _product(grad.t(), x.t(), kind, ctx.by_row) if wanted[1] else None
        return d_x, d_weight, None


def _product(a: Tensor, b: Tensor, kind: torch.dtype, by_row: bool) -> Tensor:
    """``a b^T`` of factors rounded to FP8, a to ``kind`` and b to e4m3: [m, k], [n, k]  ->  [m, n], like a."""
    (a8, scale_a), (b8, scale_b) = _rounded(a, kind, by_row), _rounded(b, torch.float8_e4m3fn, by_row)
    if multiplies_fp8(a.device):
        missing = -a8.shape[1] % MULTIPLE
        a8, b8 = (pad(t.view(torch.uint8), (0, missing)).view(t.dtype) if missing else t for t in (a8, b8))
        return torch._scaled_mm(a8, b8.t(), scale_a, scale_b.t() if by_row else scale_b, out_dtype=a.dtype)
    return (a8.float() @ b8.float().t()).mul_(scale_a).mul_(scale_b.t() if by_row else scale_b).to(a.dtype)


def _rounded(x: Tensor, kind: torch.dtype, by_row: bool) -> tuple[Tensor, Tensor]:
    """FP8 numbers, row by row in memory, and the fp32 scale of all, or [rows, 1]."""
    size = x.abs().amax(1, keepdim=True) if by_row else x.abs().amax()
    scale = size.float().clamp(min=LEAST) / torch.finfo(kind).max
    return (x.float() / scale).to(kind).contiguous(), scale
