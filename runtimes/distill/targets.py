"""What a student is to learn at each position: the teacher's logits of a few candidates."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from runtimes.data import Batch


@dataclass(frozen=True)
class Targets:
    """The teacher's answers at n positions of a batch."""

    rows: Tensor
    """int64 [n], the positions among all of the batch, row after row"""

    ids: Tensor
    """int64 [n, C], the candidates; the first is the teacher's likeliest token"""

    logits: Tensor
    """fp16 [n, C]"""

    logsumexp: Tensor
    """fp32 [n], of the teacher's whole vocabulary"""

    labels: Tensor
    """int64 [n], the text's own next token"""

    vocabulary: int
    """Logits of the teacher."""

    def to(self, device: torch.device | str) -> Targets:
        """The same on another device."""
        moved = {key: value.to(device, non_blocking=True) for key, value in vars(self).items() if key != "vocabulary"}
        return replace(self, **moved)

    def part(self, at: Tensor) -> Targets:
        """Some of the positions."""
        return replace(self, **{key: value[at] for key, value in vars(self).items() if key != "vocabulary"})


@dataclass(frozen=True)
class TaughtBatch(Batch):
    """A batch with what a teacher says of it."""

    targets: Targets = field(kw_only=True)

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        return replace(super().to(device), targets=self.targets.to(device))
