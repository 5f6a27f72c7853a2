"""What the tensors of a run were like: how large, how many of them too small for a normal fp16 number."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from runtimes.mil.precision import SMALLEST_NORMAL


@dataclass
class Seen:
    """One tensor, over all the runs that were traced."""

    largest: float = 0.0
    """Largest |x| of its finite elements."""

    highest: float = float("-inf")
    """Largest x of its finite elements."""

    count: int = 0
    subnormal: int = 0
    """Elements that are not 0 and below 6.1e-5."""

    infinite: int = 0
    """Elements that are not finite."""

    @property
    def subnormal_share(self) -> float:
        """Share of the elements that only a subnormal fp16 number holds."""
        return self.subnormal / self.count if self.count else 0.0


@dataclass
class Trace:
    """Float tensors by name. Give one to several runs to have their extremes."""

    seen: dict[str, Seen] = field(default_factory=dict)

    def note(self, name: str, value: Tensor) -> None:
        """Take one result into account."""
        if not value.is_floating_point():
            return
        entry = self.seen.setdefault(name, Seen())
        size = value.detach().abs()
        finite = size.isfinite()
        entry.count += value.numel()
        entry.infinite += int((~finite).sum())
        entry.subnormal += int(((size > 0) & (size < SMALLEST_NORMAL)).sum())
        if bool(finite.any()):
            entry.largest = max(entry.largest, float(size[finite].max()))
            entry.highest = max(entry.highest, float(value[finite].max()))
