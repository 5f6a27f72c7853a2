"""Learning rates as functions of the optimizer step, and of nothing else."""

from __future__ import annotations

import math

from runtimes.settings import Group

_DECAY_OF_WSD = 0.2


def rate(group: Group, step: int, steps: int) -> float:
    """The learning rate of ``group`` for optimizer step ``step`` (0 is the first) of ``steps``.

    It rises in a line over the warm-up, reaching ``lr`` with the step after it, and comes down to what would be
    ``lr * min_lr_ratio`` with the step after the last, so that no step is wasted. Before ``start_step`` it is 0.

    >>> [round(rate(Group(lr=1.0, schedule="linear", warmup=2), step, 6), 2) for step in range(6)]
    [0.33, 0.67, 1.0, 0.75, 0.5, 0.25]
    """
    if step < group.start_step:
        return 0.0
    step, steps = step - group.start_step, steps - group.start_step
    warmup = min(group.warmup_steps(steps), steps)
    if step < warmup:
        return group.lr * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(steps - warmup, 1)
    return group.lr * (group.min_lr_ratio + (1 - group.min_lr_ratio) * _left(group.schedule, done))


def _left(schedule: str, done: float) -> float:
    """How much is left of the way down, when the fraction ``done`` of the steps after the warm-up has passed."""
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1.0 - done
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    assert schedule == "wsd", f"no schedule {schedule}"
    return min(1.0, (1.0 - done) / _DECAY_OF_WSD)
