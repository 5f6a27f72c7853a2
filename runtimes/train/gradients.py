"""What happens to gradients between the backward and the step, in a fixed order.

``ORDER`` is unscale, norms, filter, clip, step. The loss is already divided by the number of labels of the whole
optimizer step and trained tensors are fp32, so that there is no scale to undo; a filter sees the raw norms logged
and its own result clipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graph import QcError
from runtimes.train.distribute import local

ORDER = ("unscale", "norms", "filter", "clip", "step")

Filter = Callable[[Mapping[str, Tensor]], None]
"""Changes gradients, given by name, in place."""


@dataclass(frozen=True)
class Norms:
    """Euclidean norms of the gradients of one step."""

    total: float
    groups: Mapping[str, float]


def prepare(
    gradients: Mapping[str, Mapping[str, Tensor]],
    loss: Tensor,
    *,
    step: int,
    clip: float | None,
    filters: Sequence[Filter] = (),
    reduce: Callable[[Tensor], Tensor] = lambda squares: squares,
) -> tuple[float, Norms]:
    """Measure, filter and clip the gradients of a step, and return its loss and their norms.

    gradients: group -> name -> gradient    loss: scalar, for the log    reduce: sums squares over the processes that
    hold parts of the same gradients. A loss or norm that is not finite is an error that names step and group. The
    device is waited for once.
    """
    squares = reduce(torch.stack([_square(list(named.values()), loss) for named in gradients.values()]))
    measured = torch.cat([loss.detach().double().reshape(1), squares]).tolist()
    value, norms = measured[0], {name: square**0.5 for name, square in zip(gradients, measured[1:], strict=True)}
    if not _finite(value):
        raise QcError(
            f"the loss is {value} at step {step}",
            fix="lower the learning rate or lengthen the warm-up; the last checkpoint is whole",
        )
    for name, norm in norms.items():
        if not _finite(norm):
            raise QcError(
                f"the gradient of group {name!r} is {norm} at step {step}",
                fix="lower the learning rate of the group or clip; the last checkpoint is whole",
            )
    found = Norms(sum(measured[1:]) ** 0.5, norms)
    for change in filters:
        for named in gradients.values():
            change(named)
    total = (
        found.total
        if not filters
        else float(reduce(torch.stack([_square(list(n.values()), loss) for n in gradients.values()])).sum()) ** 0.5
    )
    if clip is not None and total > clip:
        torch._foreach_mul_([local(g) for named in gradients.values() for g in named.values()], clip / total)
    return value, found


def _square(gradients: list[Tensor], like: Tensor) -> Tensor:
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=like.device)
    return torch.stack(torch._foreach_norm([local(g) for g in gradients])).double().square().sum()


def _finite(value: float) -> bool:
    return value - value == 0
