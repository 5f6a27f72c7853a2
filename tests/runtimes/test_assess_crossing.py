"""Where a falling accuracy crosses a target, and that it may not."""

from __future__ import annotations

import math

import pytest
import torch

from runtimes.assess.crossing import crossing, falling
from runtimes.assess.noise import statistics


def logistic(middle: float, levels: int = 10, noise: float = 0.0) -> list[float]:
    """A known curve: 75 % is at ``middle + log(1/0.75 - 1)``."""
    generator = torch.Generator().manual_seed(0)
    wobble = (torch.randn(levels, generator=generator) * noise).tolist()
    return [1 / (1 + math.exp(level - middle)) + w for level, w in zip(range(1, levels + 1), wobble, strict=True)]


@pytest.mark.parametrize("middle", [3.0, 4.5, 6.2, 9.0])
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_the_level_is_within_one_of_where_a_known_curve_crosses(middle: float, noise: float) -> None:
    accuracies = logistic(middle, noise=noise)
    found = crossing(accuracies, 0.75, 0.05)
    assert found.level is not None and found.nearest is not None
    known = middle + math.log(1 / 0.75 - 1)
    assert abs(found.level - known) < (0.15 if not noise else 1)
    assert abs(found.nearest - known) <= 1
    assert found == crossing(accuracies, 0.75, 0.05)


def test_between_two_levels_it_is_a_straight_line() -> None:
    found = crossing([0.9, 0.8, 0.6, 0.5], 0.75, 0.05)
    assert found.level == pytest.approx(2.25)
    assert found.zone == pytest.approx((2.0, 2.5))
    assert found.said == "75.0% is crossed at level 2.25; levels 2.00 to 2.50 are near it"


@pytest.mark.parametrize(
    ("accuracies", "zone", "said"),
    [
        ([0.6, 0.5], None, "no crossing: the easiest level, 1, is at 60.0%, below 75.0%"),
        (
            [0.72, 0.5],
            (1.0, pytest.approx(1 + 0.02 / 0.22)),
            "no crossing: the easiest level, 1, is at 72.0%, below 75.0%",
        ),
        ([0.95, 0.9, 0.85], None, "no crossing: the hardest level, 3, is at 85.0%, above 75.0%"),
    ],
)
def test_no_crossing_is_an_answer(accuracies: list[float], zone: object, said: str) -> None:
    found = crossing(accuracies, 0.75, 0.05)
    assert (found.level, found.nearest, found.said) == (None, None, said)
    assert found.zone == zone


def test_what_rises_is_pooled_with_what_is_before_it() -> None:
    assert falling([0.9, 0.5, 0.7, 0.3]) == pytest.approx([0.9, 0.6, 0.6, 0.3])
    assert falling([0.1, 0.2, 0.6]) == pytest.approx([0.3, 0.3, 0.3])
    found = crossing([0.9, 0.7, 0.8, 0.6], 0.75, 0.01)
    assert found.level == pytest.approx(2.5), "it stays at 75 % from level 2 to level 3"


def test_the_noise_scale_is_the_spread_over_the_square_of_the_mean() -> None:
    batches = [{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}, {"w": torch.tensor([1.0, 1.0])}]
    found = statistics(batches)
    mean = torch.tensor([2.0, 2.0]) / 3
    spread = sum(float((one["w"] - mean).square().sum()) for one in batches) / 3
    assert found.norm == pytest.approx(float(mean.norm()))
    assert found.noise_scale == pytest.approx(spread / float(mean.square().sum()))
    same = statistics([{"w": torch.tensor([3.0, 1.0])}] * 8)
    assert same.noise_scale == pytest.approx(0.0, abs=1e-12)
    assert same.element_variance == pytest.approx(1.0)
    scaled = statistics([{"w": 10 * one["w"]} for one in batches])
    assert scaled.noise_scale == pytest.approx(found.noise_scale), "it does not depend on the scale of the gradient"
