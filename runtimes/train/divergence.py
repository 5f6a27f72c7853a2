"""Whether the loss of a training runs away."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

from runtimes.settings import Divergence


class Watch:
    """Compares the mean loss of the last steps with the lowest such mean there was."""

    def __init__(self, settings: Divergence | None, losses: Iterable[float] = ()):
        self.settings = settings
        self.recent: deque[float] = deque(maxlen=settings.window if settings else 1)
        self.lowest, self.steps = math.inf, 0
        for loss in losses:
            self.see(loss)

    def see(self, loss: float) -> None:
        """Take note of the loss of a step."""
        self.recent.append(loss)
        self.steps += 1
        if len(self.recent) == self.recent.maxlen:
            self.lowest = min(self.lowest, self.mean)

    @property
    def mean(self) -> float:
        """Of the last steps."""
        return sum(self.recent) / len(self.recent)

    @property
    def runs_away(self) -> bool:
        """Whether it is time to end. A training that nothing is said of never runs away."""
        if self.settings is None or self.steps < self.settings.window:
            return False
        return self.mean > self.settings.ratio * self.lowest

    def said(self) -> str:
        """What was seen, as a sentence."""
        return f"the loss runs away: a mean of {self.mean:.4g} up to step {self.steps}, after one of {self.lowest:.4g}"
