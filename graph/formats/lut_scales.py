"""The scales S [out, in] of a LUT weight: nothing, one number a group of columns, or a low-rank product.

    S = max(A B, floor)                  written ``scale_a``, ``scale_b``, and a floor where negative scales are cut off
    S = (A / |A_k|) diag(g) (B / |B_k|)  with ``scale_g`` too: columns and rows of length 1, and g holds all magnitude

Arithmetic takes them as *factors*, fp32 and ready to multiply: ``()``, ``(scale,)`` or ``(a, b)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from graph.formats.format import has_data
from graph.formats.ste import check_fp16, ste_fp16, to_fp16, without_autocast

SHORTEST = 1e-6
"""Columns of A and rows of B are divided by their length, or by this where they are shorter; fp16 can hold it."""

AT_ONCE = 1 << 19
"""Weights worked on at a time: 2 MiB in fp32. Fewer stay in a cache, and cost more in calls than that gains."""

Factors = tuple[Tensor, ...]


def scale_factors(
    scale: Tensor | None,
    scale_a: Tensor | None,
    scale_b: Tensor | None,
    scale_g: Tensor | None = None,
    floor: float | None = None,
    fp16: bool = False,
) -> Factors:
    """The factors of stored scales; differentiable.

    scale: [out, groups]    scale_a: [out, r]    scale_b: [r, in]    scale_g: [r]

    ``fp16`` rounds them as a deployed graph holds them: ``a = fp16(fp16(g) A / |A_k|)``, ``b = fp16(B / |B_k|)``.
    """
    assert scale is None or (scale_a is None and scale_b is None), "group scales and low-rank scales cannot be mixed"
    assert scale_g is None or floor is None, "scales with magnitudes of their own have no floor"
    assert (scale_a is None) == (scale_b is None), "scale_a and scale_b belong together"
    if scale is not None:
        return (_held(scale.float(), fp16),)
    if scale_a is None or scale_b is None:
        return ()
    a, b = scale_a.float().contiguous(), scale_b.float().contiguous()  # in another order sums would round otherwise
    if scale_g is None:
        return _held(a, fp16), _held(b, fp16)
    if fp16:
        check_fp16(a)
    a, b = _UnitFactors.apply(a, b, scale_g.float(), fp16)
    return a, b


def _held(x: Tensor, fp16: bool) -> Tensor:
    return ste_fp16(x) if fp16 else x


class _UnitFactors(torch.autograd.Function):
    """``A / |A_k| * g`` and ``B / |B_k|``, in one step: of small tensors it is the number of steps that costs."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, g: Tensor, fp16: bool) -> tuple[Tensor, Tensor]:
        length_a, length_b = _length(a, 0), _length(b, 1)
        unit_a, unit_b = a / length_a, b / length_b
        held_g = to_fp16(g) if fp16 else g
        ctx.save_for_backward(unit_a, length_a, unit_b, length_b, held_g)
        scaled = unit_a * held_g
        return (to_fp16(scaled), to_fp16(unit_b)) if fp16 else (scaled, unit_b.clone())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_a: Tensor, d_b: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        unit_a, length_a, unit_b, length_b, g = ctx.saved_tensors
        d_g, across_a = _split(d_a, unit_a, length_a, 0)
        _, across_b = _split(d_b, unit_b, length_b, 1)
        return across_a.mul_(g / length_a), across_b.div_(length_b), d_g.view(-1), None


def _split(grad: Tensor, unit: Tensor, length: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """How much of ``grad`` lies along the unit vectors, and what of it does not; of too short ones all of it."""
    room = grad * unit
    along = room.sum(dim, keepdim=True)
    torch.mul(unit, along * (length > SHORTEST), out=room)
    return along, torch.sub(grad, room, out=room)


def _length(x: Tensor, dim: int) -> Tensor:
    """The lengths of vectors along ``dim``, or what they are divided by where that is more."""
    return x.square().sum(dim, keepdim=True).sqrt_().clamp_(min=SHORTEST)  # vector_norm is slow along columns


def dense_scale(factors: Factors, columns: int, floor: float | None = None, out: Tensor | None = None) -> Tensor | None:
    """S [out, in] of the factors, written to ``out`` if that is given; None where there are none."""
    if not factors:
        return None
    if len(factors) == 1:
        (scale,) = factors
        spread = scale[:, :, None].expand(-1, -1, columns // scale.shape[1]).reshape(-1, columns)
        return spread if out is None else out.copy_(spread)
    a, b = factors
    with without_autocast(a):
        s = torch.mm(a, b, out=out)
    return s if floor is None else s.clamp_(min=floor)


def rows_of(factors: Factors, rows: slice) -> Factors:
    """The factors of some rows of S."""
    return tuple(factor[rows] if i == 0 else factor for i, factor in enumerate(factors))


def not_positive(factors: Factors, columns: int) -> int:
    """How many entries of S are zero or less."""
    if not factors or not has_data(factors[0]):
        return 0
    found = (dense_scale(rows_of(factors, part), columns) for part in row_parts(factors[0].shape[0], columns))
    return sum(int((s <= 0).sum()) for s in found if s is not None)


def row_parts(rows: int, columns: int, at_once: int = AT_ONCE) -> Iterator[slice]:
    """Slices of all rows, as many at a time as are worked on."""
    step = max(1, at_once // max(1, columns))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
