"""Latent weights that begin as the ternary weight of least error at the outputs, not as the nearest one.

With C the mean of ``x xᵀ`` over the inputs of a linear, its outputs are off by ``tr (W - V) C (W - V)ᵀ`` where V has
scale times integer in the place of W. Integers and scales are found in turns:

1. integers are rounded with feedback, one column after another (feedback.py), on the scales of the rule;
2. scales become those of least error for these integers, a row's all at once;
3. every column moves to the integers that are best while all others stay (``settled``), and so on from 2.

What comes of it are latent weights in which the rule finds these very integers and scales: the scale times the integer,
and where that is 0 as much of W as the threshold has room for.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from graph.formats.feedback import damped, lost, rounded_with_feedback, settled
from graph.formats.format import has_data
from graph.formats.ternary_rule import AT_ONCE, TernaryRule

SWEEPS = 6
"""How often all columns move; each sweep gains less than the one before it."""

MARGIN = 0.01
"""How far what is 0 stays below its threshold, as a share of it: no rounding carries one across, in fp16 either."""

SMALLEST_SHARE = 0.1
"""A scale of which least squares would leave less than this share, or nothing, stays what it was."""


def begun(w: Tensor, covariance: Tensor, by: TernaryRule) -> Tensor:
    """The latent weight.

    w: [out, in], float    covariance: f32 [in, in], the inputs' mean products  ->  like w
    """
    if not has_data(w):
        return w.new_empty(w.shape)
    integers, scale = fitted_with_feedback(w, covariance, by)
    return latent_of(w, integers, scale, by).to(w.dtype)


def fitted_with_feedback(w: Tensor, covariance: Tensor, by: TernaryRule) -> tuple[Tensor, Tensor]:
    """Integers and scales of least error at the outputs; never of more than those of the rule.

    w: [out, in], float    covariance: f32 [in, in]  ->  f32 [out, in], and f32 [out, groups] or [1, 1]
    """
    w, c = w.detach().float(), damped(covariance)
    grid = replace(by, fit="least-squares").fitted(w, covariance.diagonal())
    scale, nearest = grid.scale, grid.codes(w).float() - 1
    integers = rounded_with_feedback(w, _columns(scale, w), _nearest, covariance, nearest)
    for _ in range(SWEEPS):
        scale = _better_scale(w, integers, scale, c)
        integers = settled(w, _columns(scale, w), _nearest, c, integers)
    return integers, _better_scale(w, integers, scale, c)


def latent_of(w: Tensor, integers: Tensor, scale: Tensor, by: TernaryRule) -> Tensor:
    """Floats in which the rule, with scales of least squares, finds these integers and scales.

    w: [out, in]    integers: f32 [out, in], -1, 0 and 1    scale: f32 [out, groups] or [1, 1], above 0
    ->  f32 [out, in]
    """
    shape = by.scale_shape(tuple(w.shape))
    rows = (1, 1, -1) if by.group is None else (*shape, -1)
    w, q, s = w.float().reshape(rows), integers.reshape(rows), scale.view(*shape, 1)
    threshold = (0.5 if by.tau is None else by.tau) * s * q.abs().mean(-1, keepdim=True)  # what is 0 only lifts it
    ends = threshold * (1 - MARGIN)
    return torch.where(q == 0, w.clamp(-ends, ends), q * s).reshape(integers.shape)


def _better_scale(w: Tensor, integers: Tensor, scale: Tensor, c: Tensor) -> Tensor:
    """The scales of least error for these integers; the old ones of a row, or of the weight, that has none better."""
    groups = scale.shape[1]
    systems = [_system(w[part], integers[part], c, groups) for part in _parts(w)]
    matrix, wanted = (torch.cat(found) for found in zip(*systems, strict=True))
    if scale.shape[0] == 1:
        matrix, wanted = matrix.sum(0, keepdim=True), wanted.sum(0, keepdim=True)
    unused = matrix.diagonal(dim1=1, dim2=2) <= 0  # a group whose integers are all 0
    found = torch.linalg.solve(matrix + torch.diag_embed(unused.double()), wanted).float()
    found = torch.where(found > SMALLEST_SHARE * scale, found, scale)
    before, after = (lost(w - _columns(one, w) * integers, c) for one in (scale, found))
    better = after < before if scale.shape[0] == w.shape[0] else (after.sum() < before.sum())[None]
    return torch.where(better[:, None], found, scale)


def _system(w: Tensor, integers: Tensor, c: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """What least squares solves for the scales of each row: f64 [rows, groups, groups] and [rows, groups]."""
    matrix, wanted = [], []
    for q, part in zip(integers.chunk(groups, 1), c.chunk(groups, 0), strict=True):
        pulls = q @ part
        matrix.append((pulls * integers).view(w.shape[0], groups, -1).sum(-1, dtype=torch.float64))
        wanted.append((pulls * w).sum(-1, dtype=torch.float64))
    return torch.stack(matrix, 1), torch.stack(wanted, 1)


def _nearest(x: Tensor) -> Tensor:
    return x.round().clamp(-1, 1)


def _columns(scale: Tensor, w: Tensor) -> Tensor:
    """[out, groups] or [1, 1]  ->  [out, in]."""
    return scale.repeat_interleave(w.shape[1] // scale.shape[1], 1).expand(w.shape)


def _parts(w: Tensor) -> list[slice]:
    """Slices of all rows, as many at a time as are worked on."""
    step = max(1, AT_ONCE // w.shape[1])
    return [slice(start, start + step) for start in range(0, w.shape[0], step)]
