"""Rounding a weight so that its outputs stay: what a column loses, the columns behind it make good.

With C the mean of ``x xᵀ`` over the inputs, outputs are off by ``tr (W - V) C (W - V)ᵀ``. Columns are rounded one after
another, those of the largest inputs first; after each, all that are not yet rounded move to where they are best given
what was lost (GPTQ: E. Frantar et al., arXiv:2210.17323, algorithm 1). Levels and scales stay what they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graph.formats.scales import apart_from_zero

DAMPING = 0.01
"""What is added to the diagonal of C, as a share of its mean: inputs that were never seen apart can be later."""

BLOCK = 128
"""Columns after which what was lost reaches all those behind, as one product."""


def rounded_with_feedback(w: Tensor, s: Tensor | None, levels: Tensor, covariance: Tensor, nearest: Tensor) -> Tensor:
    """The indices of the levels of least error at the outputs; rows that are better off with the nearest have those.

    w: [out, in], float    s: f32 [out, in] or None: 1    levels: f32 [n], or [groups, n] where rows share them
    covariance: f32 [in, in], symmetric    nearest: u8 [out, in]  ->  u8 [out, in]
    """
    w = w.detach().float()
    s = torch.ones_like(w) if s is None else apart_from_zero(s)
    table = levels.detach().float().view(-1, levels.shape[-1])
    table = table.repeat_interleave(w.shape[0] // table.shape[0], 0)
    damped = covariance.float() + DAMPING * covariance.diagonal().mean() * torch.eye(w.shape[1], device=w.device)
    order = damped.diagonal().argsort(descending=True, stable=True)
    found = torch.empty_like(nearest)
    found[:, order] = _one_by_one(w[:, order], s[:, order], table, _factor(damped[order][:, order]))
    better = _lost(w, s, table, damped, found) < _lost(w, s, table, damped, nearest)
    return torch.where(better[:, None], found, nearest)


def _factor(damped: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse: its rows say how the columns behind make good what one lost."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def _one_by_one(w: Tensor, s: Tensor, table: Tensor, factor: Tensor) -> Tensor:
    """The indices, u8 [out, in], of columns in the order in which they come."""
    left, found = w.clone(), torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    thresholds = (table[:, 1:] + table[:, :-1]) / 2
    for start in range(0, w.shape[1], BLOCK):
        end = min(start + BLOCK, w.shape[1])
        here, losses = left[:, start:end], torch.empty(w.shape[0], end - start, device=w.device)
        for j in range(end - start):
            column, scale = here[:, j], s[:, start + j]
            index = (column / scale)[:, None].gt(thresholds).sum(1)
            loss = (column - table.gather(1, index[:, None])[:, 0] * scale) / factor[start + j, start + j]
            here[:, j + 1 :].addr_(loss, factor[start + j, start + j + 1 : end], alpha=-1)
            found[:, start + j], losses[:, j] = index, loss
        left[:, end:].addmm_(losses, factor[start:end, end:], alpha=-1)
    return found


def _lost(w: Tensor, s: Tensor, table: Tensor, covariance: Tensor, indices: Tensor) -> Tensor:
    """The squared error at the outputs, by row."""
    off = w - table.gather(1, indices.long()) * s
    return ((off @ covariance) * off).sum(1)
