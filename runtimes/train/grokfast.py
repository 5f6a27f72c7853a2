"""Gradients with their slow part amplified: Grokfast's moving average (arXiv:2405.20233).

    mean' = decay * mean + (1 - decay) * g        the first gradient is the first mean
    g'    = g + strength * mean'

A low-pass: a gradient that stays the same comes out ``1 + strength`` times as large, one that changes its sign at every
step ``1 + strength * (1 - decay) / (1 + decay)`` times. Subtracting the mean instead would do the opposite.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from runtimes.settings import Grokfast
from runtimes.train.distribute import fill, local, whole


class SlowGradients:
    """The filter, and the means it has of every gradient."""

    def __init__(self, settings: Grokfast, parameters: Mapping[str, Tensor]):
        self.settings, self.parameters = settings, parameters
        self.means: dict[str, Tensor] = {}

    def __call__(self, named: Mapping[str, Tensor]) -> None:
        """Follow the gradients, and add the means to them, in place."""
        for name, gradient in named.items():
            if name not in self.means:
                self.means[name] = gradient.detach().clone()
            else:
                local(self.means[name]).lerp_(local(gradient), 1 - self.settings.decay)
            local(gradient).add_(local(self.means[name]), alpha=self.settings.strength)

    def state(self) -> dict[str, Tensor]:
        """The means, for a checkpoint."""
        return {name: whole(mean) for name, mean in self.means.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take the means from a checkpoint."""
        for name, value in state.items():
            self.means[name] = self.parameters[name].detach().clone()
            fill(self.means[name], value)
