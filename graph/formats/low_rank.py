"""Levels and scales fitted to a weight together: ``min sum_i m_i (W_oi - Q_oi S_oi)^2``, m the inputs' second moments.

Each round picks the nearest level of every weight, then solves for the scales of each row, for the levels, and for the
columns of low-rank scales, each by least squares with the rest held. No step raises the error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graph.formats.fit import Fit, row_slices
from graph.formats.format import has_data
from graph.formats.levels import uniform_levels
from graph.formats.row_scales import GroupScales, LowRankScales, RowScales
from graph.formats.scales import expand_rank as expand_rank
from graph.formats.scales import group_absmax as group_absmax
from graph.formats.scales import low_rank_of_groups as low_rank_of_groups

START_GROUP = 32
"""Columns that share a scale in the matrix that low-rank scales start from."""

ROUNDS = 4
"""A round takes about 50 ns a weight on one core; the fourth lowers the error by less than a per cent."""


@dataclass(frozen=True)
class Fitted:
    """Levels, indices and scales of a weight [out, in]; either ``scale`` or all of ``a``, ``g`` and ``b``."""

    levels: Tensor
    """f32 [n], or [out / rows_per_lut, n]: fp16 numbers, strictly increasing, the largest magnitude about 1."""

    indices: Tensor
    """u8 [out, in], one a byte: the nearest level of every ``w / S``."""

    scale: Tensor | None = None
    """f32 [out, groups], positive."""

    a: Tensor | None = None
    """f32 [out, r], columns of length 1."""

    g: Tensor | None = None
    """f32 [r], descending."""

    b: Tensor | None = None
    """f32 [r, in], rows of length 1."""

    errors: tuple[float, ...] = ()
    """``|W - Q S| / |W|``, weighted: of the start, with fitted levels, and after each round. Never rising."""


def fit_scales(
    w: Tensor,
    n: int,
    *,
    rank: int | None = None,
    group: int | None = None,
    moments: Tensor | None = None,
    rows_per_lut: int | None = None,
    symmetric: bool = False,
    zero_free: bool = False,
    rounds: int = ROUNDS,
    start: Fitted | None = None,
) -> Fitted:
    """``n`` levels and the scales of least squared error, from uniform levels and absmax scales, or from ``start``, on.

    w: [out, in], float    moments: [in], the inputs' mean squares, or None: all alike

    Scales are one a ``group`` of columns, one a row where ``group`` is None, or of ``rank``, starting from groups of
    ``group`` (32). ``rows_per_lut`` gives that many rows levels of their own. Ends after ``rounds``, or when nothing
    more is gained; the error is never above that of the start, and the same weight gives the same result.
    """
    rows, columns = w.shape
    per_lut = rows_per_lut or rows
    assert rows % per_lut == 0, f"{rows} rows are not whole groups of {per_lut}"
    scales = _absmax_scales(w, rank, group) if start is None else _scales_of(start, columns)
    shape = (rows // per_lut, n)
    if not has_data(w):
        levels = w.new_empty(shape if rows_per_lut else shape[1:], dtype=torch.float32)
        return Fitted(levels, w.new_empty(w.shape, dtype=torch.uint8), errors=(), **scales.tensors())
    levels = uniform_levels(n).to(w.device)
    if start is not None and start.levels.shape[-1] == n:
        levels = start.levels.float().sort(dim=-1).values  # trained freely, they may be out of order
    fit = Fit(w, moments, scales, levels.expand(shape).contiguous(), symmetric, zero_free)
    errors = fit.run(rounds, _balanced_scales(w, rank, group) if rank and start is None else None)
    return Fitted(fit.levels if rows_per_lut else fit.levels[0], fit.indices, errors=errors, **fit.scales.tensors())


def _absmax_scales(w: Tensor, rank: int | None, group: int | None) -> RowScales:
    """Absmax scales, or the low-rank product nearest to them."""
    columns = w.shape[1]
    if rank is not None:
        group = group or min(START_GROUP, columns)
        return LowRankScales.of_groups(group_absmax(w, group), group, columns, rank)
    group = group or columns
    assert columns % group == 0, f"groups of {group} do not divide {columns} columns"
    return GroupScales(group_absmax(w, group), columns)


def _balanced_scales(w: Tensor, rank: int, group: int | None) -> RowScales:
    """The low-rank absmax scales of the weight with all columns equally large, times how large they are.

    A product takes in a factor a column at no cost, and then a group's scale no longer is that of its largest column.
    """
    columns = w.shape[1]
    group = group or min(START_GROUP, columns)
    parts = row_slices(*w.shape)
    size = torch.stack([w[part].float().square().sum(0) for part in parts]).sum(0).sqrt()
    size = torch.where(size > 0, size, 1.0)
    absmax = torch.cat([group_absmax(w[part].float() / size, group) for part in parts])
    scales = LowRankScales.of_groups(absmax, group, columns, rank)
    return LowRankScales(scales.a, scales.b * size).orthonormal()


def _scales_of(start: Fitted, columns: int) -> RowScales:
    if start.scale is not None:
        return GroupScales(start.scale.float().clone(), columns)
    assert start.a is not None and start.g is not None and start.b is not None
    return LowRankScales(start.a.float() * start.g.float(), start.b.float()).orthonormal()
