"""Latent ternary weights that begin with the integers and scales of least error at the outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from graph.formats.feedback import damped, lost, settled
from graph.formats.ternary_rule import TernaryRule
from graph.formats.ternary_start import begun, fitted_with_feedback, latent_of

RULES = [
    TernaryRule("dead-zone", 0.7, "least-squares", 16),
    TernaryRule("dead-zone", 1.0, "least-squares", 64),
    TernaryRule("dead-zone", 0.05, "least-squares", None),
    TernaryRule("round-clip", None, "least-squares", 32),
]


@pytest.fixture(scope="module")
def c() -> Tensor:
    """Of inputs that vary together, in directions of very different size."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(500, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    return x.t() @ x / len(x)


@pytest.fixture(scope="module")
def w() -> Tensor:
    made = 0.03 * torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    made[3], made[5, :16] = 0, 0  # a row, and a group, of which nothing is to be had
    return made


def off(w: Tensor, v: Tensor, c: Tensor) -> Tensor:
    return lost(w.float() - v, c)


@pytest.mark.parametrize("by", RULES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_rule_finds_the_integers_to_the_bit_and_the_scales(
    w: Tensor, c: Tensor, by: TernaryRule, dtype: torch.dtype
) -> None:
    integers, scale = fitted_with_feedback(w.to(dtype), c, by)
    latent = begun(w.to(dtype), c, by)
    assert latent.dtype == dtype and latent.shape == w.shape
    found = by.fitted(latent)
    assert (found.codes(latent).int() - 1).equal(integers.int())
    used = (integers != 0).view(scale.shape[0], scale.shape[1], -1).any(-1) if by.group else torch.tensor([[True]])
    torch.testing.assert_close(found.scale[used], scale[used], rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("by", RULES, ids=str)
def test_outputs_lose_half_of_what_the_rule_by_itself_does_and_no_row_more(
    w: Tensor, c: Tensor, by: TernaryRule
) -> None:
    plain, latent = by.fitted(w, c.diagonal()), begun(w, c, by)
    before, after = off(w, plain.dense(w), damped(c)), off(w, by.fitted(latent).dense(latent), damped(c))
    assert after.sum() < 0.55 * before.sum()
    if by.group is not None:
        assert bool((after <= before * (1 + 1e-4)).all())


def test_integers_that_settle_lose_less_than_those_rounded_with_feedback(w: Tensor, c: Tensor) -> None:
    by = RULES[0]
    scale = by.fitted(w).scale.repeat_interleave(16, 1)
    integers = by.fitted(w).codes(w).float() - 1
    after = settled(w, scale, lambda x: x.round().clamp(-1, 1), damped(c), integers)
    assert set(after.unique().tolist()) == {-1.0, 0.0, 1.0}
    before, now = off(w, integers * scale, damped(c)), off(w, after * scale, damped(c))
    assert bool((now <= before * (1 + 1e-5) + 1e-12).all()) and now.sum() < 0.7 * before.sum()
    one, j = after.clone(), 7  # nobody gains by moving alone, once all have come to rest
    for _ in range(20):
        one = settled(w, scale, lambda x: x.round().clamp(-1, 1), damped(c), one)
    rest = off(w, one * scale, damped(c))
    for value in (-1.0, 0.0, 1.0):
        other = one.clone()
        other[:, j] = value
        assert bool((off(w, other * scale, damped(c)) >= rest * (1 - 1e-4) - 1e-9).all())


def test_columns_move_over_the_borders_of_blocks_as_one_by_one(monkeypatch: Any, w: Tensor, c: Tensor) -> None:
    scale, pick = torch.full_like(w, 0.03), lambda x: x.round().clamp(-1, 1)
    start = pick(w / scale)
    at_once = settled(w, scale, pick, damped(c), start)
    monkeypatch.setattr("graph.formats.feedback.BLOCK", 5)
    assert settled(w, scale, pick, damped(c), start).equal(at_once)


def test_what_is_zero_keeps_its_sign_and_as_much_of_the_weight_as_the_threshold_has_room_for(
    w: Tensor, c: Tensor
) -> None:
    by = RULES[0]
    integers, scale = fitted_with_feedback(w, c, by)
    latent, zero = latent_of(w, integers, scale, by), integers == 0
    assert latent[~zero].equal((integers * scale.repeat_interleave(16, 1))[~zero])
    assert bool((latent[zero].abs() <= w[zero].abs()).all()) and bool((latent[zero] * w[zero] >= 0).all())
    assert 0.1 < float((latent[zero] == w[zero]).float().mean()) < 1.0


def test_a_plan_begins_without_values(c: Tensor) -> None:
    made = begun(torch.empty(48, 64, device="meta"), torch.empty(64, 64, device="meta"), RULES[0])
    assert made.is_meta and made.shape == (48, 64)
