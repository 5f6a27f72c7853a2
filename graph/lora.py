"""LoRA: low-rank updates beside frozen linears (arXiv:2106.09685), and DoRA (arXiv:2402.09353), as ops.

    y + s B A x                          qc.lora(y, x, A, B, alpha)
    f (y + s B A x - bias) + bias        qc.dora(qc.lora(...), qc.dora_factor(W, A, B, m, alpha), bias)

with ``s = alpha / r``, or ``alpha / sqrt(r)`` for rank-stabilised LoRA (arXiv:2312.03732), and one factor
``f = m / |W + s B A|`` per output. A and B are kept in their own dtype, usually fp32, and rounded to that of ``y``
for the products; their gradients come back in their own dtype.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.autograd.function import once_differentiable

from graph.ops import op, op_name

if TYPE_CHECKING:
    from graph.core import Graph

TINY = 1e-30
"""The norm of a row of zeros, so that DoRA does not divide by it."""


def scale_of(alpha: float, rank: int, rslora: bool) -> float:
    """What ``B A x`` is multiplied by."""
    return alpha / (math.sqrt(rank) if rslora else rank)


@op
def lora(y: Tensor, x: Tensor, a: Tensor, b: Tensor, alpha: float, rslora: bool = False) -> Tensor:
    """Add a low-rank update of a linear's input ``x`` to its output ``y``.

    y: [..., out]    x: [..., in]    a: [r, in]    b: [out, r]  ->  like y

    For the backward it keeps x, a and b, no copy of them, and ``A x``, which is r numbers a row.
    """
    scale = scale_of(alpha, a.shape[0], rslora)
    if _trains(y, x, a, b):
        return _Lora.apply(y, x, a, b, scale, False)
    return _update(y, x, a, b, scale, in_place=False)


@op
def lora_in_place(y: Tensor, x: Tensor, a: Tensor, b: Tensor, alpha: float, rslora: bool = False) -> Tensor:
    """``lora`` that writes its result over ``y``; see ``write_in_place`` for where that is allowed.

    y: [..., out]    x: [..., in]    a: [r, in]    b: [out, r]  ->  y
    """
    scale = scale_of(alpha, a.shape[0], rslora)
    in_place = y.is_contiguous() and not y._is_view()  # with a bias it is a view, whose history costs more than a copy
    if _trains(y, x, a, b):
        return _Lora.apply(y, x, a, b, scale, in_place)
    return _update(y, x, a, b, scale, in_place)


class _Lora(torch.autograd.Function):
    """Keeps ``A x`` for the backward, which is r numbers a row."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, in_place: bool) -> Tensor:
        low = _down(y, x, a)
        ctx.save_for_backward(x, a, b, low)
        ctx.scale = scale
        if in_place:
            ctx.mark_dirty(y)
        return _up(y, low, b, scale, in_place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, low = ctx.saved_tensors
        g = _rows(grad)
        d_low = torch.mm(g, b.to(grad.dtype)).mul_(ctx.scale)
        d_x = d_a = d_b = None
        if ctx.needs_input_grad[1]:
            d_x = torch.mm(d_low, a.to(grad.dtype)).view(x.shape).to(x.dtype)
        if ctx.needs_input_grad[2]:
            d_a = torch.mm(d_low.t(), _rows(x).to(grad.dtype)).to(a.dtype)
        if ctx.needs_input_grad[3]:  # the short side first: this product is twice as fast as its transpose
            d_b = torch.mm((low.to(grad.dtype) * ctx.scale).t(), g).t().to(b.dtype)
        return grad, d_x, d_a, d_b, None, None


def _update(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, in_place: bool) -> Tensor:
    return _up(y, _down(y, x, a), b, scale, in_place)


def _down(y: Tensor, x: Tensor, a: Tensor) -> Tensor:
    """``A x`` in the dtype of ``y``: [rows, r]."""
    return torch.mm(_rows(x).to(y.dtype), a.to(y.dtype).t())


def _up(y: Tensor, low: Tensor, b: Tensor, scale: float, in_place: bool) -> Tensor:
    """``y + s B low``."""
    if in_place:
        y.view(-1, y.shape[-1]).addmm_(low, b.to(y.dtype).t(), alpha=scale)
        return y
    return torch.addmm(_rows(y), low, b.to(y.dtype).t(), alpha=scale).view(y.shape)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _trains(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


@op
def dora_factor(weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor, alpha: float, rslora: bool = False) -> Tensor:
    """``m / |W + s B A|`` per output. Only the magnitude gets a gradient, as section 4.3 of the paper has it.

    weight: [out, in]    a: [r, in]    b: [out, r]    magnitude: [out]  ->  [out]
    """
    with torch.no_grad():
        norm = row_norms(weight, a, b, scale_of(alpha, a.shape[0], rslora))
    return magnitude / norm


@op
def dora(y: Tensor, factor: Tensor, bias: Tensor | None = None) -> Tensor:
    """``factor (y - bias) + bias``, and exactly ``y`` where the factor is 1.

    y: [..., out]    factor: [out]    bias: [out]  ->  like y
    """
    without = y if bias is None else y - bias
    return torch.addcmul(y, (factor - 1).to(y.dtype), without)


def row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``|W + s B A|`` of every row, in fp32, without that sum: its square is ``|W|² + 2 s <W A', B> + s² <B A A', B>``.

    weight: [out, in]    a: [r, in]    b: [out, r]  ->  [out]
    """
    w, a, b = weight.float(), a.float(), b.float()
    cross = (torch.mm(w, a.t()) * b).sum(1)
    own = (torch.mm(b, torch.mm(a, a.t())) * b).sum(1)
    square = torch.linalg.vector_norm(w, dim=1).square() + 2 * scale * cross + scale * scale * own
    return square.clamp_(min=0).sqrt_().clamp_(min=TINY)


def merged(weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor | None, scale: float) -> Tensor:
    """The dense weight that stands for ``weight`` and the update beside it, in fp32.

    weight: [out, in]    a: [r, in]    b: [out, r]    magnitude: [out]  ->  [out, in]
    """
    total = torch.addmm(weight.float(), b.float(), a.float(), alpha=scale)
    if magnitude is None:
        return total
    return total.mul_((magnitude.float() / row_norms(weight, a, b, scale))[:, None])


PRODUCERS = (
    "aten.linear", "qc.linear_4bit", "qc.linear_int8", "qc.linear_scaled", "qc.linear_lut", "qc.linear_fake_lut",
    "qc.linear_vector_lut", "qc.linear_fake_vector_lut", "qc.lora", "qc.lora_in_place",
)  # fmt: skip
"""Ops that return a tensor of their own and do not need it in their backward."""


def write_in_place(graph: Graph) -> int:
    """Let updates write over the output of their linear, where nothing else reads it; return how many do.

    For the copy that trains, once its linears are fused: a new tensor per update costs more than the update. Values
    and gradients stay the same bits; what the linear itself gave can no longer be looked at.
    """
    changed = 0
    for site in graph.sites("qc.lora"):
        y = site.node.args[0]
        if isinstance(y, fx.Node) and y.op == "call_function" and op_name(y.target) in PRODUCERS and len(y.users) == 1:
            site.node.target = lora_in_place
            changed += 1
    graph.verify()
    return changed
