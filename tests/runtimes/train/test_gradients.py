from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from graph import QcError
from runtimes.train.gradients import prepare


def gradients() -> dict[str, dict[str, Tensor]]:
    return {"a": {"w": torch.tensor([3.0, 0.0]), "v": torch.tensor([[4.0]])}, "b": {"u": torch.tensor([12.0])}}


def test_norms_are_measured_by_group_and_over_all() -> None:
    loss, norms = prepare(gradients(), torch.tensor(1.5), step=1, clip=None)
    assert (loss, norms.groups, norms.total) == (1.5, {"a": 5.0, "b": 12.0}, 13.0)


def test_all_gradients_are_clipped_together_and_the_norm_before_is_reported() -> None:
    found = gradients()
    _, norms = prepare(found, torch.tensor(1.5), step=1, clip=1.3)
    assert norms.total == 13.0
    torch.testing.assert_close(found["a"]["w"], torch.tensor([0.3, 0.0]))
    torch.testing.assert_close(found["b"]["u"], torch.tensor([1.2]))


def test_a_gradient_below_the_limit_is_not_touched() -> None:
    found = gradients()
    prepare(found, torch.tensor(1.5), step=1, clip=14.0)
    assert torch.equal(found["b"]["u"], torch.tensor([12.0]))


def test_filters_come_behind_the_norms_and_before_the_clip() -> None:
    def double(named: Mapping[str, Tensor]) -> None:
        for value in named.values():
            value.mul_(2)

    found = gradients()
    _, norms = prepare(found, torch.tensor(1.5), step=1, clip=13.0, filters=[double])
    assert norms.total == 13.0
    torch.testing.assert_close(found["b"]["u"], torch.tensor([12.0]))  # doubled, and clipped from 26 to 13


def test_a_group_that_has_not_started_has_no_gradient() -> None:
    assert prepare({"a": {}}, torch.tensor(1.0), step=1, clip=1.0)[1].groups == {"a": 0.0}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_the_step(value: float) -> None:
    with pytest.raises(QcError) as caught:
        prepare(gradients(), torch.tensor(value), step=7, clip=1.0)
    assert str(caught.value) == (
        f"the loss is {value} at step 7\n"
        "  fix    lower the learning rate or lengthen the warm-up; the last checkpoint is whole"
    )


def test_a_gradient_that_is_not_finite_names_step_and_group() -> None:
    found = gradients()
    found["b"]["u"][0] = math.inf
    with pytest.raises(QcError) as caught:
        prepare(found, torch.tensor(1.0), step=7, clip=1.0)
    assert str(caught.value) == (
        "the gradient of group 'b' is inf at step 7\n"
        "  fix    lower the learning rate of the group or clip; the last checkpoint is whole"
    )
