"""What a fit of levels and scales does with every weight, in one pass where there is a C compiler: see native.py.

Both ways find the same levels, and sum in doubles: in another order, which no choice of the fit is near enough to see.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graph.formats import native
from graph.formats.levels import nearest
from graph.formats.scales import apart_from_zero


def assign(w: Tensor, s: Tensor, levels: Tensor, moments: Tensor | None, out: Tensor) -> float:
    """Write the index of the level nearest to every ``w / s``; the squared error that is left, weighted by ``moments``.

    w, s: f32 [rows, in]    levels: f32 [n], strictly increasing    moments: f32 [in] or None    out: u8 [rows, in]
    """
    found = native.function("lut_assign", w, s, levels, out, *_given(moments))
    if found is not None:
        thresholds = (levels[1:] + levels[:-1]) / 2
        at = map(native.at, (levels, thresholds))
        return float(found(native.at(w), native.at(s), *w.shape, *at, levels.numel(), *map(native.at, (moments, out))))
    out.copy_(nearest(w / apart_from_zero(s), levels))
    errors = (w - _picked(levels, out) * s).square_()
    return float((errors if moments is None else errors.mul_(moments)).sum(dtype=torch.float64))


def nearest_of(w: Tensor, s: Tensor | None, levels: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The index of the level nearest to every ``w / s``, and that level, written to ``out`` if that is given.

    w, s: f32 [rows, in]    levels: f32 [n], strictly increasing  ->  u8 and f32 [rows, in]
    """
    q = torch.empty_like(w, dtype=torch.float32) if out is None else out
    found = native.function("lut_nearest", w, q, levels, *_given(s))
    if found is not None:
        indices, thresholds = torch.empty(w.shape, dtype=torch.uint8), (levels[1:] + levels[:-1]) / 2
        told = *w.shape, *map(native.at, (levels, thresholds)), levels.numel()
        found(native.at(w), native.at(s), *told, *map(native.at, (indices, q)))
        return indices, q
    indices = nearest(w if s is None else w / apart_from_zero(s), levels)
    torch.index_select(levels, 0, indices.int().reshape(-1), out=q.view(-1))
    return indices, q


def products(w: Tensor, indices: Tensor, levels: Tensor, moments: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``m q q`` and ``m q w`` of every weight, q the level of its index: what least squares for scales are made of.

    w: f32 [rows, in]    indices: u8 [rows, in]    levels: f32 [n]    moments: f32 [in] or None: 1  ->  f32 [rows, in]
    """
    rows, columns = w.shape
    squares, products = w.new_empty(2, rows, columns)
    found = native.function("lut_products", squares, products, levels, *_given(moments))
    if found is not None and w.stride(1) == indices.stride(1) == 1:
        read = native.at(indices), indices.stride(0), native.at(w), w.stride(0)
        found(*read, rows, columns, *map(native.at, (levels, moments, squares, products)))
        return squares, products
    q = _picked(levels, indices)
    weighted = q if moments is None else q * moments
    return torch.mul(weighted, q, out=squares), torch.mul(weighted, w, out=products)


def level_sums(w: Tensor, s: Tensor, indices: Tensor, moments: Tensor | None, below: Tensor, above: Tensor) -> None:
    """Add ``m s s`` and ``m s w`` of every weight to the sums of its level.

    w, s: f32 [rows, in]    indices: u8 [rows, in]    below, above: f64 [n]
    """
    found = native.function("lut_sums", w, s, indices, below, above, *_given(moments))
    if found is not None:
        found(*map(native.at, (indices, w, s)), *w.shape, *map(native.at, (moments, below, above)))
        return
    weighted = s if moments is None else s * moments
    at, n = indices.reshape(-1), below.numel()
    below += torch.bincount(at, (weighted * s).view(-1).double(), minlength=n)
    above += torch.bincount(at, (weighted * w).view(-1).double(), minlength=n)


def _given(x: Tensor | None) -> tuple[Tensor, ...]:
    """What of it there is to look at."""
    return () if x is None else (x,)


def _picked(levels: Tensor, indices: Tensor) -> Tensor:
    return levels.index_select(0, indices.int().reshape(-1)).view(indices.shape)
