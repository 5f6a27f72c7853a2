"""Rounding a weight so that its outputs stay: what a column loses, the columns behind it make good.

With C the mean of ``x xᵀ`` over the inputs, outputs are off by ``tr (W - V) C (W - V)ᵀ``. Columns are rounded one after
another, those of the largest inputs first; after each, all that are not yet rounded move to where they are best given
what was lost (GPTQ: E. Frantar et al., arXiv:2210.17323, algorithm 1). Levels and scales stay what they are. Once all
have numbers, each can move again, to what is best with all others as they are: ``settled``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from graph.formats.scales import apart_from_zero

DAMPING = 0.01
"""What is added to the diagonal of C, as a share of its mean: inputs that were never seen apart can be later."""

BLOCK = 128
"""Columns after which what was lost reaches all those behind, as one product."""


Pick = Callable[[Tensor], Tensor]
"""The nearest numbers to a column of a weight over its scales.

f32 [out]  ->  f32 [out]
"""


def rounded_with_feedback(
    w: Tensor, s: Tensor | None, pick: Pick, covariance: Tensor, nearest: Tensor, together: int = 1
) -> Tensor:
    """Numbers that times scales make outputs of least error; rows that are better off with the nearest have those.

    So many rows, whose numbers ``pick`` takes from one vector, are better or worse off ``together``.

    w: [out, in], float    s: f32 [out, in] or None: 1    covariance: f32 [in, in], symmetric
    nearest: f32 [out, in], what ``pick`` gives of each column  ->  f32 [out, in]
    """
    w = w.detach().float()
    s = torch.ones_like(w) if s is None else apart_from_zero(s)
    c = damped(covariance)
    order = c.diagonal().argsort(descending=True, stable=True)
    found = torch.empty_like(w)
    found[:, order] = _one_by_one(w[:, order], s[:, order], pick, _factor(c[order][:, order]))
    gained = (lost(w - nearest * s, c) - lost(w - found * s, c)).view(-1, together).sum(1)
    return torch.where((gained > 0).repeat_interleave(together)[:, None], found, nearest)


def settled(w: Tensor, s: Tensor, pick: Pick, c: Tensor, numbers: Tensor) -> Tensor:
    """The numbers after each column, one after another, has moved to what is best while all others stay.

    Nothing is lost by it: with the others as they are, what a column loses is a parabola in its number.

    w: [out, in], float    s: f32 [out, in]    c: f32 [in, in], damped    numbers: f32 [out, in]  ->  f32 [out, in]
    """
    s, found = apart_from_zero(s), numbers.clone()
    pull = torch.addcmul(w.float(), found, s, value=-1) @ c
    for start in range(0, w.shape[1], BLOCK):
        end = min(start + BLOCK, w.shape[1])
        here, moved = pull[:, start:end], torch.empty(w.shape[0], end - start, device=w.device)
        for j in range(end - start):
            column = start + j
            number = pick(found[:, column] + here[:, j] / (c[column, column] * s[:, column]))
            moved[:, j] = (number - found[:, column]) * s[:, column]
            here[:, j + 1 :].addr_(moved[:, j], c[column, column + 1 : end], alpha=-1)
            found[:, column] = number
        pull[:, end:].addmm_(moved, c[start:end, end:], alpha=-1)
    return found


def damped(covariance: Tensor) -> Tensor:
    """The covariance with a little more on its diagonal, f32 [in, in]."""
    identity = torch.eye(covariance.shape[0], device=covariance.device)
    return covariance.float() + DAMPING * covariance.diagonal().mean() * identity


def lost(off: Tensor, c: Tensor) -> Tensor:
    """The squared error at the outputs, by row: f32 [out, in]  ->  f32 [out]."""
    return ((off @ c) * off).sum(1)


def levels_by_row(levels: Tensor, rows: int) -> Pick:
    """Picks levels: f32 [n], or [groups, n] where rows share them by group."""
    table = levels.detach().float().view(-1, levels.shape[-1])
    table = table.repeat_interleave(rows // table.shape[0], 0)
    thresholds = (table[:, 1:] + table[:, :-1]) / 2
    return lambda x: table.gather(1, x[:, None].gt(thresholds).sum(1, keepdim=True))[:, 0]


def _factor(c: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse: its rows say how the columns behind make good what one lost."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(c))
    return torch.linalg.cholesky(inverse, upper=True)


def _one_by_one(w: Tensor, s: Tensor, pick: Pick, factor: Tensor) -> Tensor:
    """The numbers, f32 [out, in], of columns in the order in which they come."""
    left, found = w.clone(), torch.empty_like(w)
    for start in range(0, w.shape[1], BLOCK):
        end = min(start + BLOCK, w.shape[1])
        here, losses = left[:, start:end], torch.empty(w.shape[0], end - start, device=w.device)
        for j in range(end - start):
            column, scale = here[:, j], s[:, start + j]
            number = pick(column / scale)
            loss = (column - number * scale) / factor[start + j, start + j]
            here[:, j + 1 :].addr_(loss, factor[start + j, start + j + 1 : end], alpha=-1)
            found[:, start + j], losses[:, j] = number, loss
        left[:, end:].addmm_(losses, factor[start:end, end:], alpha=-1)
    return found
