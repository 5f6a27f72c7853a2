"""What a training reports at its end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What came of a training."""

    steps: int
    tokens: int
    seconds: float
    """Time spent in steps and evaluations, over all runs that it took."""

    first_loss: float
    last_loss: float
    """Loss of the first and last step, nats per token."""

    eval_loss: float | None
    eval_perplexity: float | None
    """At the last evaluation, of what is returned."""

    best_step: int | None
    best_loss: float | None
    checkpoint: Path
    """The checkpoint of the last step."""

    sha256: str
    """Of the file with the trained tensors."""

    resumed_from: int
    """The step it went on from; 0 if it began."""

    notes: tuple[str, ...]


def perplexity(loss: float) -> float:
    """The perplexity of a loss in nats per token."""
    return math.exp(loss) if loss < 700 else math.inf
