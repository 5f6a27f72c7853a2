"""The levels of a lookup table: uniform, fitted to values, or trained; and the one rule that picks a level.

Every level is exactly an fp16 number and the levels are strictly increasing, however they came about.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from graph.errors import QcError
from graph.formats.format import has_data
from graph.formats.kmeans import Floats, Ints, exact_centres, weighted_points
from graph.formats.ste import straight_fp16
from graph.ops import op

CHUNK = 1 << 16
"""Values whose levels are picked at a time, so that they stay in the cache from one threshold to the next."""

MANY_LEVELS = 128
"""Above this, a binary search is quicker than one comparison with each threshold."""

ROUNDS = 64
"""In which 256 levels with many narrow gaps come to rest; 16 do in the first."""

NORMAL, LARGEST = 0x0400, 0x7BFF
"""The patterns of the smallest normal fp16 number, 2^-14, and of the largest, 65504."""

REACH = float(torch.finfo(torch.float16).max)


def uniform_levels(n: int, largest: float = 1.0) -> Tensor:
    """``n`` evenly spaced levels from ``-largest`` to ``largest``, computed in fp16.

    ->  f32 [n]
    """
    assert n >= 2
    return torch.linspace(-largest, largest, n, dtype=torch.float16).float()


def fit_levels(
    values: Tensor, n: int, weight: Tensor | None = None, *, symmetric: bool = False, zero_free: bool = False
) -> Tensor:
    """The ``n`` levels of least squared distance from ``values``: exact k-means, then rounded to fp16.

    values: [...], float    weight: like values, not negative, or None: all alike  ->  f32 [n]

    Exact for bf16 and fp16 values, in whatever dtype they come; within 0.02 dB of the optimum for others. ``symmetric``
    is the optimum among levels that come in pairs ``±l``, with 0 between them where ``n`` is odd; ``zero_free`` keeps
    every level at least 2^-14 from 0. Where there are fewer distinct values than levels, spare ones lie beside them.
    """
    assert n >= 2 and not (symmetric and zero_free and n % 2), "an odd number of symmetric levels has a zero"
    if not has_data(values):
        return values.new_empty(n, dtype=torch.float32)
    points, weights = weighted_points(values.detach().abs() if symmetric else values, weight, n)
    assert points.size, "no value has a weight"
    if not np.isfinite(points[[0, -1]]).all():
        raise QcError("the values to fit levels to are not all finite", fix="look for inf and nan in the weights")
    points = points.clip(-REACH, REACH)  # further out there is no level, and one as far as that would be wasted
    centres = exact_centres(points, weights, (n + 1) // 2 if symmetric else n, first_at_zero=symmetric and n % 2 == 1)
    return fp16_levels(centres, n, symmetric=symmetric, zero_free=zero_free).to(values.device)


def fp16_levels(centres: Floats, n: int, *, symmetric: bool = False, zero_free: bool = False) -> Tensor:
    """``n`` strictly increasing fp16 numbers, each the nearest to its centre but where two would be the same.

    centres: ascending; of ``symmetric`` levels those from 0 up  ->  f32 [n]
    """
    wanted = (n + 1) // 2 if symmetric else n
    centres = np.concatenate((centres, np.full(wanted - centres.size, centres[-1])))
    keys = _keys(centres)
    if symmetric:
        upper = _apart(keys[n % 2 :], NORMAL if zero_free else 1)
        keys = np.concatenate((-upper[::-1], np.zeros(n % 2, np.int64), upper))
    elif zero_free:
        below = centres < 0
        keys = np.concatenate((-_apart(-keys[below][::-1], NORMAL)[::-1], _apart(keys[~below], NORMAL)))
    else:
        keys = _apart(keys, -LARGEST)
    patterns = np.where(keys < 0, -keys | 0x8000, keys).astype(np.uint16)
    return torch.from_numpy(patterns.view(np.float16).astype(np.float32))


def _keys(centres: Floats) -> Ints:
    """The number of each value's nearest fp16 number, counted up from 0 and down from it: -3 is the third below."""
    patterns = np.clip(centres, -65504, 65504).astype(np.float16).view(np.int16).astype(np.int64)
    return np.where(patterns < 0, -(patterns & 0x7FFF), patterns)


def _apart(keys: Ints, least: int) -> Ints:
    """Ascending ``keys`` moved up where two are the same or below ``least``, and down where that passes the largest."""
    steps = np.arange(keys.size)
    keys = np.maximum.accumulate(np.maximum(keys, least) - steps) + steps
    return np.minimum(keys, LARGEST - steps[::-1])


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    """The index of the level nearest to each value; of two equally near the lower. Computed in fp32.

    x: [...]    levels: [n], n <= 256, strictly increasing  ->  u8 [...]
    """
    assert levels.ndim == 1 and levels.numel() <= 256
    if not (has_data(x) and has_data(levels)):
        return x.new_empty(x.shape, dtype=torch.uint8)
    levels = levels.detach().float()
    thresholds = (levels[1:] + levels[:-1]) / 2
    flat = x.detach().float().reshape(-1)
    if flat.is_cuda or levels.numel() > MANY_LEVELS:
        return torch.bucketize(flat, thresholds.to(flat.device)).to(torch.uint8).view(x.shape)
    return _thresholds_below(flat, thresholds).view(x.shape)


def _thresholds_below(flat: Tensor, thresholds: Tensor) -> Tensor:
    """How many thresholds are below each value; numpy compares and adds several times faster than torch does."""
    found = torch.zeros(flat.shape, dtype=torch.uint8)
    values, counts = flat.numpy(), found.numpy()
    above = np.empty(min(CHUNK, flat.numel()), dtype=np.bool_)
    for start in range(0, values.size, CHUNK):
        part, count = values[start : start + CHUNK], counts[start : start + CHUNK]
        for threshold in thresholds.numpy():
            np.greater(part, threshold, out=above[: part.size])
            np.add(count, above[: part.size].view(np.uint8), out=count)
    return found


@op
def monotone_levels(theta: Tensor, largest: float = 1.0) -> Tensor:
    """Levels that train: whatever ``theta``, they are symmetric, strictly increasing, fp16 numbers and never zero.

    theta: [..., n / 2]  ->  f32 [..., n], from ``-largest`` to ``largest``

    The gaps from 0 up are ``least + (largest - n / 2 * least) * softmax(theta)``; fp16 rounding passes gradients.
    """
    half = theta.shape[-1]
    least = _least_gap(2 * half, largest)
    gaps = least + (largest - half * least) * torch.softmax(theta.float(), dim=-1)
    upper = straight_fp16(torch.cumsum(gaps, dim=-1))
    return torch.cat((-upper.flip(-1), upper), dim=-1)


def theta_of(levels: Tensor) -> Tensor:
    """The ``theta`` whose ``monotone_levels(theta, largest)`` are these levels, of which that is the largest.

    levels: [..., n], n even, symmetric, strictly increasing, to one largest level  ->  f32 [..., n / 2], of mean 0

    Gaps that are narrower than ``monotone_levels`` makes them become as narrow as it can.
    """
    half = levels.shape[-1] // 2
    if not has_data(levels):
        return levels.new_empty((*levels.shape[:-1], half), dtype=torch.float32)
    if levels.shape[-1] % 2 or not torch.equal(levels, -levels.flip(-1)):
        raise QcError(
            "levels train only where they are symmetric and even in number, and these are not",
            fix="fit them with symmetric: true, or leave the lut frozen",
        )
    upper = levels[..., half:].double()
    largest = largest_level(levels)
    gaps = torch.diff(upper, prepend=torch.zeros_like(upper[..., :1])) - _least_gap(2 * half, largest)
    logits = gaps.clamp(min=1e-6 * largest).log()
    return (logits - logits.mean(dim=-1, keepdim=True)).float()


def largest_level(levels: Tensor) -> float:
    """What levels reach up to; 1 where there are no values."""
    return float(levels.max()) if has_data(levels) else 1.0


def trainable_levels(levels: Tensor) -> Tensor:
    """The levels that ``theta_of`` gives back exactly, nearest to symmetric ones; with few levels the same."""
    for _ in range(ROUNDS if has_data(levels) else 0):
        found = monotone_levels(theta_of(levels), largest_level(levels))
        if torch.equal(found, levels):
            break
        levels = found
    return levels


def _least_gap(n: int, largest: float) -> float:
    """Four fp16 steps at ``largest``, at least 1e-4, and at most half of what even levels would be apart."""
    assert 2 <= n <= 256 and largest >= n * 2.0**-21, "fp16 has not that many numbers there"
    return min(max(2.0 ** (math.ceil(math.log2(largest)) - 9), 1e-4), largest / n)
