"""Rounding a weight so that its outputs stay: what a column loses, the columns behind it make good.

With C the mean of ``x xᵀ`` over the inputs, outputs are off by ``tr (W - V) C (W - V)ᵀ``. Columns are rounded one after
another, those of the largest inputs first; after each, all that are not yet rounded move to where they are best given
what was lost (GPTQ: E. Frantar et al., arXiv:2210.17323, algorithm 1). Levels and scales stay what they are.
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
    damped = covariance.float() + DAMPING * covariance.diagonal().mean() * torch.eye(w.shape[1], device=w.device)
    order = damped.diagonal().argsort(descending=True, stable=True)
    found = torch.empty_like(w)
    found[:, order] = _one_by_one(w[:, order], s[:, order], pick, _factor(damped[order][:, order]))
    gained = (_lost(w - nearest * s, damped) - _lost(w - found * s, damped)).view(-1, together).sum(1)
    return torch.where((gained > 0).repeat_interleave(together)[:, None], found, nearest)


def levels_by_row(levels: Tensor, rows: int) -> Pick:
    """Picks levels: f32 [n], or [groups, n] where rows share them by group."""
    table = levels.detach().float().view(-1, levels.shape[-1])
    table = table.repeat_interleave(rows // table.shape[0], 0)
    thresholds = (table[:, 1:] + table[:, :-1]) / 2
    return lambda x: table.gather(1, x[:, None].gt(thresholds).sum(1, keepdim=True))[:, 0]


def _factor(damped: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse: its rows say how the columns behind make good what one lost."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
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


def _lost(off: Tensor, covariance: Tensor) -> Tensor:
    """The squared error at the outputs, by row."""
    return ((off @ covariance) * off).sum(1)
