"""What a training can be told of what rests and what trains when: the keys of two parts of ``train:``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from graph.select import Selector


@dataclass(frozen=True, kw_only=True)
class AutoSnap:
    """Rounds tensors to the fp16 grid and freezes them, once, when they have come to rest."""

    select: Selector | Mapping[str, Any] | None = None
    """Which trained tensors; without it the magnitudes of LUT scales, ``{name: '*.scale_g'}``."""

    every: int = 25
    """Optimizer steps between two looks at them."""

    threshold: float = 0.01
    """They rest while no value moves by more than this share of itself from one look to the next."""

    patience: int = 2
    """Looks in a row at which they have to rest."""

    start: int = 0
    """Optimizer steps before it begins to look."""

    @property
    def earliest(self) -> int:
        """The optimizer steps after which it snaps if all rest from the start."""
        return self.start + self.every * (self.patience + 1)


@dataclass(frozen=True, kw_only=True)
class Backtrack:
    """Trains a layer again if the next one starts badly."""

    ratio: float = 10.0
    """How many times the loss at which the layer before ended a layer may start at."""

    limit: int = 2
    """How often one and the same layer may ask for that."""


@dataclass(frozen=True, kw_only=True)
class Layerwise:
    """Trains one layer after the other, towards what each did before the passes; what steps are left train all."""

    order: tuple[Literal["mlp", "attn", "blocks"], ...] = ("mlp", "attn")
    """Which layers, one kind after the other, each from the first block to the last."""

    steps_per_layer: int
    """Optimizer steps of each."""

    local: float = 0.5
    """Weight of the local loss: how far the layer's output is from that of the layer before the passes."""

    kd: float = 0.5
    """Weight of the objective beside it."""

    backtrack: Backtrack | None = None
    """When to train the layer before once more."""


@dataclass(frozen=True, kw_only=True)
class Grokfast:
    """Amplifies what stays the same in the gradients (arXiv:2405.20233)."""

    decay: float = 0.98
    """Decay of the moving average of each gradient, per optimizer step."""

    strength: float = 2.0
    """How many times that average is added to the gradient."""


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Two terms beside the loss, on the weights that staged cross-attention gives to documents."""

    sparsity: float = 0.01
    """Weight of the mean entropy of a position's weights, which falls as each looks at few documents."""

    balance: float = 0.01
    """Weight of minus the entropy of the mean weights, which falls as all documents are looked at by some."""


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Ends a training that runs away, and goes back to its best checkpoint."""

    ratio: float = 1.5
    """It runs away when the mean loss of the last steps is so many times the lowest such mean."""

    window: int = 20
    """Optimizer steps of a mean."""


def size_in_bytes(text: str) -> int | None:
    """The bytes of ``8GiB`` or ``500 MB``; 0 for ``auto``, None for anything else."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([kMG])(i?)B", text)
    if match is None:
        return 0 if text == "auto" else None
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** ("kMG".index(match[2]) + 1)) or None
