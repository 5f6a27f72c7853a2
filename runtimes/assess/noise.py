"""How much the gradients of one kind of text differ from batch to batch.

Of gradients ``g_b`` of equal batches, with their mean ``g``:

    noise scale   B = mean |g_b - g|² / |g|²     (arXiv:1812.06162: near 0 where all batches agree)
    element variance = sum over tensors of the variance of the elements of g

The second depends on the scale of the largest tensor and says nothing of batches; it is here because it is asked for.
Neither tells by itself whether text is too hard.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GradientStatistics:
    """Of the gradients of some batches."""

    batches: int
    norm: float
    """Of the mean gradient."""

    noise_scale: float
    element_variance: float


def statistics(gradients: Iterable[Mapping[str, Tensor]]) -> GradientStatistics:
    """The statistics of gradients by batch, each by the name of its tensor. One batch's are held beside their sum."""
    total: dict[str, Tensor] = {}
    squares, count = 0.0, 0
    for named in gradients:
        count += 1
        for name, gradient in named.items():
            squares += float(gradient.double().square().sum())
            total[name] = total[name] + gradient.double() if name in total else gradient.double()
    assert count >= 2, "the noise of fewer than two batches"
    mean = {name: value / count for name, value in total.items()}
    square = sum(float(value.square().sum()) for value in mean.values())
    spread = max(squares / count - square, 0.0)
    element = sum(float(torch.var(value, correction=0)) for value in mean.values())
    return GradientStatistics(count, square**0.5, spread / square if square else float("inf"), element)
