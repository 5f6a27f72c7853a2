"""The exact optimum of k-means in one dimension, on weighted points.

In one dimension a cluster is a run of the sorted points, so the optimum is a shortest path over the ``n - 1`` borders
(H. Wang, M. Song, "Ckmeans.1d.dp", The R Journal 3/2, 2011). The best place of a border moves to the right as the last
point does: each row of the table is filled by divide and conquer (X. Wu, "Optimal quantization by matrix searching",
Journal of Algorithms 12, 1991), all midpoints of one depth in a few numpy calls.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

POINTS = 4096
"""Points that a source of more distinct values is gathered into; at least ``POINTS_PER_CENTRE`` a centre."""

POINTS_PER_CENTRE = 64
"""The borders are exact to a point, which costs about ``1 / 64^2`` of the optimum at most, 0.001 dB."""


def exact_centres(points: Floats, weights: Floats, n: int, *, first_at_zero: bool = False) -> Floats:
    """The ``n`` centres of least weighted squared distance from ``points``; fewer where there are fewer points.

    points: [m], ascending    weights: [m], positive  ->  ascending

    With ``first_at_zero`` the lowest centre is held at 0; the points may not be negative then.
    """
    shift = 0.0
    counts = np.diff(np.cumsum(weights), prepend=0.0) > 0  # beside the others the rest weigh nothing, even in fp64
    points, weights = points[counts], weights[counts]
    if first_at_zero:
        assert points[0] >= 0
        points, weights = np.concatenate(([0.0], points)), np.concatenate(([0.0], weights))
    elif points.size <= n:
        return points
    else:
        shift = float(np.average(points, weights=weights))  # near zero the prefix sums lose the fewest digits
    count = np.concatenate(([0.0], np.cumsum(weights)))
    total = np.concatenate(([0.0], np.cumsum(weights * (points - shift))))
    borders = _borders(count, total, min(n, points.size), first_at_zero)
    with np.errstate(invalid="ignore"):  # the lone zero that first_at_zero put there has no weight
        centres = np.diff(total[borders]) / np.diff(count[borders]) + shift
    if first_at_zero:
        centres[0] = 0.0
    return centres


def _borders(count: Floats, total: Floats, n: int, first_at_zero: bool) -> Ints:
    """The ``n + 1`` ends of the best runs, from prefix sums of the weights and of the weighted points.

    The squared distance within a run is that from 0 less ``total^2 / count``, so the sum of the latter is maximised.
    """
    m = count.size - 1
    if n == 1:
        return np.array([0, m])
    best = np.zeros(m + 1)
    if not first_at_zero:
        best[1:] = total[1:] ** 2 / count[1:]
    choices = []
    for runs in range(2, n):
        best, choice = _add_run(best, count, total, runs)
        choices.append(choice)
    starts = np.arange(n - 1, m)
    last = best[starts] + (total[m] - total[starts]) ** 2 / (count[m] - count[starts])
    borders = [m, int(starts[np.argmax(last)])]
    for choice in reversed(choices):
        borders.append(int(choice[borders[-1]]))
    return np.array([0, *reversed(borders)])


def _add_run(best: Floats, count: Floats, total: Floats, runs: int) -> tuple[Floats, Ints]:
    """The best sums with ``runs`` runs for each end, from those with one fewer, and where the last run begins.

    best, count, total: [m + 1]  ->  [m + 1], [m + 1]; ends below ``runs`` have no value
    """
    m = best.size - 1
    found, choice = np.full(m + 1, -np.inf), np.full(m + 1, runs - 1)
    stride = 1 << (m - runs + 1).bit_length()
    while stride := stride >> 1:  # every second multiple of the stride is known: the choices there bound the others
        ends = np.arange(runs - 1 + stride, m + 1, 2 * stride)
        right = np.minimum(ends + stride, m + 1)
        low = choice[ends - stride]
        high = np.minimum(np.where(right <= m, choice[np.minimum(right, m)], m), ends - 1)
        found[ends], choice[ends] = _best_starts(best, count, total, ends, low, high)
    return found, choice


def _best_starts(best: Floats, count: Floats, total: Floats, ends: Ints, low: Ints, high: Ints) -> tuple[Floats, Ints]:
    """The best sum for each end, and where its last run begins: between ``low`` and ``high``, the first if several.

    best, count, total: [m + 1]    ends, low, high: [e]  ->  [e], [e]
    """
    lengths = high - low + 1
    offsets = np.cumsum(lengths) - lengths
    starts = np.arange(offsets[-1] + lengths[-1]) - np.repeat(offsets - low, lengths)
    span = np.repeat(total[ends], lengths) - total[starts]
    value = best[starts] + span * span / (np.repeat(count[ends], lengths) - count[starts])
    found = np.maximum.reduceat(value, offsets)
    hits = np.flatnonzero(value == np.repeat(found, lengths))
    return found, starts[hits[np.searchsorted(hits, offsets)]]


def weighted_points(values: Tensor, weight: Tensor | None, n: int) -> tuple[Floats, Floats]:
    """The distinct ``values`` in ascending order and how much each weighs, for ``n`` centres.

    values, weight: [...]  ->  [m], [m]

    Numbers of 16 bits are counted, in whatever dtype they come, so that their optimum is exact. Of others the first
    ``POINTS`` distinct ones are taken as they are; more are gathered into runs, each replaced by its mean.
    """
    flat = values.detach().cpu().reshape(-1)
    weights = None if weight is None else weight.detach().cpu().reshape(-1).double().numpy()
    short = _sixteen_bits(flat)
    if short is not None:
        return _counted(short, weights)
    if weights is None:
        points: Floats = np.sort(flat.numpy()).astype(np.float64)
        weights = np.ones_like(points)
    else:
        order = np.argsort(flat.numpy())
        points, weights = flat.numpy()[order].astype(np.float64), weights[order]
        points, weights = points[weights > 0], weights[weights > 0]
    limit = max(POINTS, POINTS_PER_CENTRE * n)
    return (points, weights) if points.size <= limit else _gathered(points, weights, limit)


def _sixteen_bits(flat: Tensor) -> Tensor | None:
    """``flat`` in bf16 or fp16 if that holds its values, else None."""
    if flat.dtype in (torch.bfloat16, torch.float16):
        return flat
    if flat.dtype == torch.float32 and not (flat.view(torch.int32).numpy() & 0xFFFF).any():
        return flat.bfloat16()
    return None


def _counted(flat: Tensor, weights: Floats | None) -> tuple[Floats, Floats]:
    patterns = flat.view(torch.int16).numpy().view(np.uint16)
    counts = np.bincount(patterns, weights, minlength=1 << 16)
    there = np.flatnonzero(counts > 0)
    points = torch.from_numpy(there.astype(np.uint16).view(np.int16)).view(flat.dtype).double().numpy()
    order = np.argsort(points)
    return points[order], counts[there][order].astype(np.float64)


def _gathered(points: Floats, weights: Floats, limit: int) -> tuple[Floats, Floats]:
    """At most ``limit`` means of runs that are short where many points lie, in the power 1/3 of the density.

    That is the spacing of the best quantizer of many levels (P. Panter, W. Dite, Proc. IRE 39, 1951), so the runs cost
    least for their number; a lone outlier keeps a run of its own.
    """
    gaps = np.diff(points)
    length = np.concatenate(([0.0], np.cumsum(np.cbrt(weights[1:] * gaps * gaps))))
    starts = np.unique(np.searchsorted(length, np.arange(limit) * (length[-1] / limit)))
    weight = np.add.reduceat(weights, starts)
    return np.add.reduceat(points * weights, starts) / weight, weight
