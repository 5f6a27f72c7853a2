"""Scale matrices S [out, in] that multiply the levels of a weight: a number a group of columns, or a low-rank product.

    S = A diag(g) B        A [out, r] of unit columns, g [r], B [r, in] of unit rows

A matrix of group scales has rank ``min(out, groups)`` at most, however many columns it is spread over, so its singular
vectors are found in the matrix [out, groups] and spread afterwards.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from graph.formats.format import has_data

SMALLEST_ABSMAX = 1e-8
"""The scale of a group that holds nothing but zeros."""

SMALLEST_SCALE = 1e-12
"""A weight is divided by its scale, or by this with the scale's sign where that is smaller."""

LowRank = tuple[Tensor, Tensor, Tensor]
"""A [out, r], g [r] and B [r, in]."""


def apart_from_zero(s: Tensor) -> Tensor:
    """S with its small entries replaced; +0 counts as positive."""
    if has_data(s) and s.numel() and bool(s.amin() >= SMALLEST_SCALE):  # as nearly always, and much quicker to see
        return s
    return torch.where(s.abs() < SMALLEST_SCALE, torch.full_like(s, SMALLEST_SCALE).copysign(s), s)


def group_absmax(w: Tensor, group: int) -> Tensor:
    """The largest magnitude of each group of columns of a row; the last group of a row may be shorter.

    w: [out, in]  ->  f32 [out, ceil(in / group)], at least 1e-8
    """
    rows, columns = w.shape
    whole = columns - columns % group
    found = _absmax(w.detach()[:, :whole].reshape(rows, -1, group))
    if whole < columns:
        found = torch.cat((found, _absmax(w.detach()[:, None, whole:])), dim=1)
    return found.float().clamp_(min=SMALLEST_ABSMAX)


def _absmax(x: Tensor) -> Tensor:
    """Over the last dimension, without a copy of all magnitudes."""
    return torch.maximum(x.amax(-1), -x.amin(-1))


def low_rank_of_groups(s: Tensor, group: int, columns: int, rank: int) -> LowRank:
    """The ``rank`` largest singular parts of group scales spread over their columns.

    s: [out, ceil(columns / group)]  ->  A [out, rank] with unit columns, g [rank] descending, B [rank, columns] with
    unit rows

    With each column of ``s`` multiplied by the root of its group's width, its singular values are those of the spread
    matrix, and B is its right factor divided by that root and spread. Ranks beyond the rank of ``s`` have magnitude 0
    and cosines for directions.
    """
    rows, groups = s.shape
    assert groups == -(-columns // group), f"{groups} groups of {group} are not {columns} columns"
    if not has_data(s):
        return s.new_empty(rows, rank), s.new_empty(rank), s.new_empty(rank, columns)
    widths = torch.full((groups,), float(group), device=s.device)
    widths[-1] = columns - (groups - 1) * group
    roots = widths.sqrt()
    u, g, vh = torch.linalg.svd(s.detach().float() * roots, full_matrices=False)
    b = (vh / roots).repeat_interleave(group, dim=1)[:, :columns]
    return with_rank(*facing_up(u[:, :rank], g[:rank], b[:rank]), rank)


def facing_up(a: Tensor, g: Tensor, b: Tensor) -> LowRank:
    """The same product with each row of B of a sum that is not negative: an SVD leaves the signs open."""
    signs = torch.where(b.sum(1) < 0, -1.0, 1.0)
    return a * signs, g, b * signs[:, None]


def with_rank(a: Tensor, g: Tensor, b: Tensor, rank: int) -> LowRank:
    """The same product with ``rank - r`` further ranks of magnitude 0, whose directions are cosines."""
    missing = rank - g.shape[0]
    if missing <= 0:
        return a, g, b
    more_a = _cosines(missing, a.shape[0]).t().to(a.device)
    more_b = _cosines(missing, b.shape[1]).to(b.device)
    return torch.cat((a, more_a), 1), torch.cat((g, g.new_zeros(missing))), torch.cat((b, more_b), 0)


def _cosines(count: int, length: int) -> Tensor:
    """``count`` rows of length 1, of 1, 2, .. half waves."""
    at = (torch.arange(length, dtype=torch.float64) + 0.5) * (math.pi / length)
    waves = torch.cos(torch.arange(1, count + 1, dtype=torch.float64)[:, None] * at)
    return torch.nn.functional.normalize(waves, dim=1).float()


def normal_form(a: Tensor, b: Tensor) -> LowRank:
    """The singular form of a product, without the product.

    a: [out, r]    b: [r, in]  ->  A, g, B with ``A diag(g) B = a b``, orthonormal, magnitudes descending
    """
    qa, ra = torch.linalg.qr(a.double())
    qb, rb = torch.linalg.qr(b.double().t())
    u, g, vh = torch.linalg.svd(ra @ rb.t())
    return facing_up((qa @ u).float(), g.float(), (vh @ qb.t()).float())


def expand_rank(w: Tensor, q: Tensor, a: Tensor, g: Tensor, b: Tensor, rank: int) -> LowRank:
    """The same scales with ``rank - r`` further ranks of magnitude 0, in the directions that lower the error fastest.

    w: [out, in]    q: [out, in], the levels of its indices    a: [out, r]    g: [r]    b: [r, in]  ->  A, g, B

    The squared error of ``q * S`` falls along ``E = q * (w - q * S)``, its negative gradient over S: the new directions
    are the leading singular vectors of E. With magnitude 0 they change no value of S; training g, or ``fit_scales``
    from there, gives them one.
    """
    missing = rank - g.shape[0]
    assert missing >= 0, f"scales of rank {g.shape[0]} do not shrink to rank {rank}"
    if not has_data(w):
        left, right = w.new_empty(w.shape[0], missing, dtype=a.dtype), w.new_empty(missing, w.shape[1], dtype=b.dtype)
    else:
        left, right = _leading(q * (w.detach().float() - q * ((a * g) @ b)), missing)
    return torch.cat((a, left), 1), torch.cat((g, g.new_zeros(missing))), torch.cat((b, right), 0)


def _leading(e: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The leading singular vectors, by subspace iteration from a fixed start.

    e: [out, in]  ->  [out, count], [count, in]
    """
    generator = torch.Generator().manual_seed(0)
    width = min(count + 8, *e.shape)
    basis = torch.randn(e.shape[1], width, generator=generator).to(e.device)
    for _ in range(8):
        basis = torch.linalg.qr(e @ basis).Q
        basis = torch.linalg.qr(e.t() @ basis).Q
    u, g, vh = torch.linalg.svd(e @ basis, full_matrices=False)
    left, _, right = with_rank(*facing_up(u[:, :count], g[:count], (vh @ basis.t())[:count]), count)
    return left, right
