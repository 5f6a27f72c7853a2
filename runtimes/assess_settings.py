"""What can be told of looking at a model before it trains: the keys of ``audit:`` and ``assess:``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from runtimes.data_settings import Data


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Whether gradients reach all that trains, and are those of the loss."""

    spots: int = 3
    """Tensors whose gradient is compared with what the loss does."""

    batch: int = 4
    """Sequences."""

    length: int = 128
    """Tokens per sequence."""

    data: Data | None = None
    """What is read; without it, what training evaluates on."""


@dataclass(frozen=True, kw_only=True)
class Assess:
    """How hard text is for the model, level by level, and where its accuracy crosses a target."""

    levels: int = 10
    """How many levels, the easiest first."""

    by: Literal["corruption", "loss"] = "corruption"
    """corruption: the same text with more and more of what is read replaced; loss: text sorted by the loss that the
    model before the passes has on it."""

    target: float = 0.75
    """The accuracy to look for, as a share of the tokens."""

    tolerance: float = 0.05
    """How far from the target is near it."""

    micro_batches: int = 8
    """Batches of a level whose gradients are compared."""

    batches: int = 2
    """Batches of held-out text, for all levels together with ``by: loss``."""

    batch: int = 8
    """Sequences per batch."""

    length: int = 128
    """Tokens per sequence."""

    data: Data | None = None
    """What is read; without it, what training evaluates on."""
