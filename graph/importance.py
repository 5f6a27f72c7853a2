"""How much of what a linear computes is lost once its weight is packed, and which weights are worth their bytes.

With moments ``E[x_i^2]`` of the inputs, columns taken to be independent, the error of the outputs is

    sum_ij E[x_j^2] (W_ij - Q_ij)^2  /  sum_ij E[x_j^2] W_ij^2

for Q what the packed weight stands for: a share of what the linear gives, 0 where nothing is lost, 1 where Q is 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graph.formats.format import Format, chunks, unpack


def output_error(form: Format, w: Tensor, packed: Mapping[str, Tensor], moments: Tensor | None) -> float:
    """The share of a linear's outputs that is lost by packing.

    w: [out, in]    packed: its side tensors    moments: [in], the mean squares of the inputs; None counts all alike
    """
    cut = form.by_row(packed)
    weight = torch.ones(w.shape[1], dtype=torch.float64, device=w.device) if moments is None else moments.double()
    signal = noise = 0.0
    for part in chunks(w):
        rows = w[part].float()
        error = rows - unpack(form, cut(part), torch.float32)
        signal += float(rows.square().sum(0, dtype=torch.float64) @ weight)
        noise += float(error.square_().sum(0, dtype=torch.float64) @ weight)
    return noise / signal if signal else 0.0


@dataclass(frozen=True)
class Candidate:
    """What can stay as it is, all of it or nothing."""

    names: tuple[str, ...]
    """Its weights."""

    cost: float
    """What it takes of the budget."""

    error: float
    """The sum of what its linears lose, each a share of its outputs."""

    @property
    def worth(self) -> float:
        """The error that a unit of the budget avoids."""
        return self.error / self.cost if self.cost else float("inf")


def within(candidates: Sequence[Candidate], budget: float) -> list[Candidate]:
    """Those to keep, the most worth first; whoever no longer fits makes room for the next. Ties go to the first."""
    kept: list[Candidate] = []
    for one in sorted(candidates, key=lambda c: -c.worth):  # sorted() leaves equals in their order
        if one.cost <= budget:
            kept.append(one)
            budget -= one.cost
    return kept
