from __future__ import annotations

import pytest

from runtimes.settings import Group
from runtimes.train.schedules import rate


def rates(steps: int = 10, **options: object) -> list[float]:
    group = Group(lr=2.0, **options)  # type: ignore[arg-type]
    return [round(rate(group, step, steps), 4) for step in range(steps)]


def test_constant_stays() -> None:
    assert rates(4, schedule="constant") == [2, 2, 2, 2]


def test_linear_falls_in_a_line_and_wastes_no_step_at_zero() -> None:
    assert rates(4, schedule="linear") == [2, 1.5, 1, 0.5]


def test_cosine_falls_slowly_then_fast_then_slowly() -> None:
    assert rates(4, schedule="cosine") == [2.0, 1.7071, 1.0, 0.2929]


def test_wsd_holds_and_falls_over_the_last_fifth() -> None:
    assert rates(10, schedule="wsd") == [2] * 9 + [1]


def test_the_floor_is_a_fraction_of_the_rate() -> None:
    assert rates(4, schedule="linear", min_lr_ratio=0.5) == [2, 1.75, 1.5, 1.25]


def test_warm_up_rises_in_a_line_and_never_starts_at_zero() -> None:
    assert rates(6, schedule="constant", warmup=3) == [0.5, 1, 1.5, 2, 2, 2]


def test_a_warm_up_below_one_is_a_fraction_of_all_steps() -> None:
    assert rates(6, schedule="constant", warmup=0.5) == rates(6, schedule="constant", warmup=3)


def test_before_its_start_a_group_rests_and_everything_counts_from_there() -> None:
    assert rates(8, schedule="linear", start_step=4) == [0, 0, 0, 0, *rates(4, schedule="linear")]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_a_warm_up_longer_than_the_training_never_falls(schedule: str) -> None:
    assert rates(3, schedule=schedule, warmup=10) == [0.5, 1, 1.5]
