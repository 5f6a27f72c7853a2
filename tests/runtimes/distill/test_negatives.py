from __future__ import annotations

import numpy as np
import pytest
import torch

from runtimes.distill.negatives import negatives, permuted


def drawn(
    rows: int, count: int, vocabulary: int, likeliest: int = 7, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    topk = torch.stack([torch.randperm(vocabulary, generator=generator)[:likeliest] for _ in range(rows)])
    return topk, negatives(topk, torch.arange(rows), count=count, vocabulary=vocabulary, seed=seed)


@pytest.mark.parametrize(("count", "vocabulary"), [(1, 9), (20, 100), (93, 100), (64, 4096), (50, 151936)])
def test_each_is_a_token_that_is_neither_among_the_likeliest_nor_there_twice(count: int, vocabulary: int) -> None:
    topk, found = drawn(40, count, vocabulary)
    assert found.shape == (40, count)
    assert found.min() >= 0 and found.max() < vocabulary
    together = torch.cat([topk, found], 1).sort(1).values
    assert (together.diff(dim=1) > 0).all()


def test_all_other_tokens_can_be_asked_for() -> None:
    topk, found = drawn(30, 93, 100)
    assert (torch.cat([topk, found], 1).sort(1).values == torch.arange(100)).all()


def test_every_token_is_drawn_equally_often() -> None:
    size, count, rows = 100, 10, 20_000
    found = permuted(np.arange(rows), count, size, seed=5)
    for column in (found, found[:, :1], found[:, -1:]):
        times = np.bincount(column.ravel(), minlength=size)
        expected = column.size / size
        chi_squared = float(((times - expected) ** 2 / expected).sum())
        assert chi_squared < 160, "99 degrees of freedom; 149 is exceeded once in a thousand"


def test_neighbouring_positions_have_nothing_to_do_with_each_other() -> None:
    found = permuted(np.arange(2000), 10, 1000, seed=5).astype(float)
    assert abs(np.corrcoef(found[:-1].ravel(), found[1:].ravel())[0, 1]) < 0.03


def test_they_follow_from_the_seed_and_the_position_alone() -> None:
    topk, found = drawn(40, 20, 500)
    later = negatives(topk[30:], torch.arange(30, 40), count=20, vocabulary=500, seed=0)
    assert torch.equal(later, found[30:])
    assert torch.equal(negatives(topk, torch.arange(40), count=20, vocabulary=500, seed=0), found)
    assert not torch.equal(drawn(40, 20, 500, seed=1)[1], found)
    assert not torch.equal(negatives(topk[:1], torch.tensor([1]), count=20, vocabulary=500, seed=0), found[:1])
