"""At which difficulty a falling accuracy crosses a target; or that it does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Crossing:
    """Where the accuracy crosses the target."""

    level: float | None
    """Between two levels where need be; None if it is not crossed."""

    zone: tuple[float, float] | None
    """The levels at which the accuracy is within the tolerance of the target; None if there are none."""

    said: str
    """The same as a sentence."""

    @property
    def nearest(self) -> int | None:
        """The level to take, a whole number."""
        return None if self.level is None else round(self.level)


def crossing(accuracies: Sequence[float], target: float, tolerance: float) -> Crossing:
    """The crossing of accuracies at the levels 1, 2, …, the easiest first.

    Measured accuracies do not fall at every level, so the nearest falling curve in squared distance is what counts
    (pool adjacent violators). Between two levels it is a straight line.
    """
    assert accuracies, "there is no level"
    curve = falling(accuracies)
    last = len(curve)
    zone = _zone(curve, target, tolerance)
    if curve[0] < target:
        said = f"no crossing: the easiest level, 1, is at {accuracies[0]:.1%}, below {target:.1%}"
        return Crossing(None, zone, said)
    if curve[-1] > target:
        said = f"no crossing: the hardest level, {last}, is at {accuracies[-1]:.1%}, above {target:.1%}"
        return Crossing(None, zone, said)
    level = _at(curve, target)
    said = f"{target:.1%} is crossed at level {level:.2f}"
    return Crossing(level, zone, said + (f"; levels {zone[0]:.2f} to {zone[1]:.2f} are near it" if zone else ""))


def falling(values: Sequence[float]) -> list[float]:
    """The sequence that never rises and is nearest to ``values`` in squared distance."""
    pools: list[tuple[float, int]] = []
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] < pools[-1][0]:
            (a, n), (b, m) = pools[-2:]
            pools[-2:] = [((a * n + b * m) / (n + m), n + m)]
    return [mean for mean, count in pools for _ in range(count)]


def _at(curve: Sequence[float], target: float) -> float:
    """Where the curve comes down to ``target``; its middle where it stays there for a while."""
    same = [level for level, value in enumerate(curve, 1) if value == target]
    if same:
        return (same[0] + same[-1]) / 2
    before = max(level for level, value in enumerate(curve, 1) if value > target)
    high, low = curve[before - 1], curve[before]
    return before + (high - target) / (high - low)


def _zone(curve: Sequence[float], target: float, tolerance: float) -> tuple[float, float] | None:
    low, high = target - tolerance, target + tolerance
    if curve[0] < low or curve[-1] > high:
        return None
    begin = 1.0 if curve[0] <= high else _at(curve, high)
    end = float(len(curve)) if curve[-1] >= low else _at(curve, low)
    return begin, end
