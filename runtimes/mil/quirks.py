"""The arithmetic of the Neural Engine where it is known to differ from fp16, by operation.

The sources are third-party measurements on some chips, collected in docs/interpreter.md under the numbers of the lint
rules: N2 products overflow at 2^15, N4 silu is off near 0, N6 slices that begin inside the last axis lose large values,
N7 sums of reductions are narrow. N5 (subnormals are lost) and N9 (NaN becomes infinity) hold for every operation and
are in ``precision.settled``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from runtimes.mil.ops.convolution import conv, is_pointwise
from runtimes.mil.ops.index import slice_by_index, slice_by_size
from runtimes.mil.ops.matrix import linear, matmul
from runtimes.mil.ops.shape import split
from runtimes.mil.ops.table import KERNELS

PRODUCT_LIMIT = 2.0**15
"""Where results and partial sums of products become infinite."""

SLICE_LIMIT = 4094.0
"""Above it, a slice that begins inside the last axis is not to be trusted."""

SILU_AT_ZERO = -0.00126
"""What silu gives for 0."""

_BLOCK = 64
"""Terms between two looks at a partial sum."""


def limited(result: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``result`` = x @ weight, infinite where it or a partial sum of it leaves the range.

    x: [..., rows, in]    weight: [..., in, out]

    The partial sums are looked at only where max|x| times the largest sum of |weight| leaves open that they overflow.
    """
    result = _saturated(result)
    bound = x.abs().amax() * weight.abs().sum(-2).amax()
    if bool(bound < PRODUCT_LIMIT):
        return result
    running = torch.zeros_like(result)
    for a, b in zip(torch.split(x, _BLOCK, -1), torch.split(weight, _BLOCK, -2), strict=True):
        running = _saturated(running + a @ b)  # an infinity stays one, or becomes NaN and then infinity
    return torch.where(running.isfinite(), result, running)


def _saturated(value: Tensor) -> Tensor:
    return torch.where(value.abs() >= PRODUCT_LIMIT, value.sign() * torch.inf, value)


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, **rest: Any) -> Tensor:
    result: Tensor = conv(x, weight, None, **rest)
    if is_pointwise(x, weight, rest.get("strides"), rest.get("groups", 1)) and result.shape[2:] == x.shape[2:]:
        rows = x.flatten(2).mT
        flat = limited(result.flatten(2).mT, rows, weight.reshape(weight.shape[:2]).mT)
        result = flat.mT.reshape(result.shape)
    else:
        result = _saturated(result)
    return result if bias is None else _saturated(result + bias.reshape(-1, *[1] * (x.ndim - 2)))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    result = limited(linear(x, weight), x, weight.mT)
    return result if bias is None else _saturated(result + bias)


def _matmul(x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    result: Tensor = matmul(x, y, transpose_x, transpose_y)
    if x.ndim < 2 or y.ndim < 2:
        return _saturated(result)
    return limited(result, x.mT if transpose_x else x, y.mT if transpose_y else y)


def _silu(x: Tensor) -> Tensor:
    """The error has the measured size at 0 and fades to nothing at |x| = 1: a model of it, not the table itself."""
    return torch.nn.functional.silu(x) + SILU_AT_ZERO * (1 - x.abs()).clamp(min=0)


def _suspicious(taken: Tensor, begins_inside: bool) -> Tensor:
    if not begins_inside or not taken.is_floating_point():
        return taken
    return torch.where(taken.abs() > SLICE_LIMIT, taken.sign() * torch.inf, taken)


def _slice_by_index(x: Tensor, begin: list[int], end: list[int], **rest: Any) -> Tensor:
    masked = rest.get("begin_mask")
    inside = len(begin) == x.ndim and begin[-1] % x.shape[-1] != 0 and not (masked and masked[-1])
    return _suspicious(slice_by_index(x, begin, end, **rest), inside)


def _slice_by_size(x: Tensor, begin: list[int], size: list[int]) -> Tensor:
    return _suspicious(slice_by_size(x, begin, size), begin[-1] % x.shape[-1] != 0)


def _split(x: Tensor, axis: int, **rest: Any) -> tuple[Tensor, ...]:
    first, *others = split(x, axis, **rest)
    last = axis % x.ndim == x.ndim - 1
    return (first, *(_suspicious(other, last) for other in others))


def narrow_sum(x: Tensor, axes: list[int] | None, keep: bool) -> Tensor:
    """A sum whose running total is rounded to fp16 after every term."""
    along = sorted(range(x.ndim) if axes is None else {a % x.ndim for a in axes})
    rest = [i for i in range(x.ndim) if i not in along]
    flat = x.permute(*along, *rest).reshape(-1, *[x.shape[i] for i in rest])
    total = torch.zeros(flat.shape[1:], dtype=torch.float16)
    for term in flat.to(torch.float16):
        total = total + term
    shape = [1 if i in along else n for i, n in enumerate(x.shape)]
    return total.float().reshape(shape) if keep else total.float()


def _reduce_sum(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    return (
        narrow_sum(x, axes, keep_dims) if x.is_floating_point() else KERNELS["reduce_sum"].function(x, axes, keep_dims)
    )


def _reduce_mean(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    total = narrow_sum(x, axes, keep_dims)
    return total / (x.numel() / max(total.numel(), 1))


def _reduce_sum_square(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
    return narrow_sum(x.square(), axes, keep_dims)


QUIRKS: dict[str, Callable[..., Any]] = {
    "conv": _conv,
    "linear": _linear,
    "matmul": _matmul,
    "silu": _silu,
    "slice_by_index": _slice_by_index,
    "slice_by_size": _slice_by_size,
    "split": _split,
    "reduce_sum": _reduce_sum,
    "reduce_mean": _reduce_mean,
    "reduce_sum_square": _reduce_sum_square,
}
