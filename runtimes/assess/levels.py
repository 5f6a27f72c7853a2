"""Held-out text in levels, the easiest first.

corruption    the same text ten times, with 0 %, 10 %, … of what is read replaced by random tokens; what is to be
              predicted stays
loss          rows sorted by what a model says of them, and cut into equal parts
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runtimes.data import Batch


@dataclass(frozen=True)
class Level:
    """Text of one difficulty."""

    name: str
    batches: tuple[Batch, ...]


def corrupted(batches: Sequence[Batch], levels: int, vocabulary: int, seed: int = 0) -> list[Level]:
    """Level ``k`` of ``levels`` with ``(k - 1) / levels`` of the tokens that are read replaced."""
    found = []
    for level in range(levels):
        share = level / levels
        generator = torch.Generator().manual_seed(seed * 1000 + level)
        changed = tuple(_corrupt(batch, share, vocabulary, generator) for batch in batches)
        found.append(Level(f"{share:.0%} replaced", changed))
    return found


def _corrupt(batch: Batch, share: float, vocabulary: int, generator: torch.Generator) -> Batch:
    shape = batch.input_ids.shape
    struck = torch.rand(shape, generator=generator) < share
    random = torch.randint(0, vocabulary, shape, generator=generator)
    return Batch(torch.where(struck, random, batch.input_ids), batch.attention_mask, batch.labels)


def by_loss(batches: Sequence[Batch], losses: Sequence[float], levels: int) -> list[Level]:
    """Rows in ``levels`` parts of as equal a size as can be, by their loss; each row is a batch of one."""
    rows = [
        Batch(*(tensor[row : row + 1] for tensor in (batch.input_ids, batch.attention_mask, batch.labels)))
        for batch in batches
        for row in range(len(batch.input_ids))
    ]
    assert len(rows) == len(losses), f"{len(rows)} rows and {len(losses)} losses"
    order = sorted(range(len(rows)), key=lambda row: (losses[row], row))
    found = []
    for level in range(levels):
        part = order[level * len(order) // levels : (level + 1) * len(order) // levels]
        name = f"loss {losses[part[0]]:.2f} to {losses[part[-1]]:.2f}"
        found.append(Level(name, tuple(rows[row] for row in part)))
    return found
