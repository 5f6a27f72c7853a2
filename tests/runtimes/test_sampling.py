"""Choosing tokens: the filters of transformers, the shares of the softmax, and settings that make no sense."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graph import QcError
from runtimes.sampling import Chooser, Sampling, filtered, penalized


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.7), (5, 1.0), (12, 0.5), (0, 1e-6), (500, 0.999)])
def test_the_filters_keep_what_those_of_transformers_keep(top_k: int, top_p: float) -> None:
    from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(3, 50)
    theirs: Any = LogitsProcessorList([TopKLogitsWarper(top_k)] if top_k else [])
    if top_p < 1:
        theirs.append(TopPLogitsWarper(top_p))
    assert torch.equal(filtered(logits, top_k, top_p), theirs(torch.zeros(3, 1, dtype=torch.long), logits))


def test_the_penalty_is_that_of_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits, seen = torch.randn(2, 20), [[1, 2, 2, 7], [3, 19, 0, 3]]
    theirs = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor(seen), logits.clone())
    assert torch.equal(penalized(logits, seen, 1.7), theirs)


def test_sampled_shares_are_those_of_the_softmax() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]]))
    choose = Chooser(Sampling(temperature=1.0), 1, torch.device("cpu"))
    drawn = torch.stack([choose(logits, [[]]) for _ in range(4000)]).flatten()
    shares = torch.bincount(drawn, minlength=3) / 4000
    assert torch.allclose(shares, torch.tensor([0.5, 0.3, 0.2]), atol=0.03)


def test_all_wrong_settings_are_reported_at_once() -> None:
    with pytest.raises(QcError) as caught:
        Sampling(max_tokens=0, temperature=-1, top_p=0, top_k=-1, repetition_penalty=0, stop=("",))
    assert str(caught.value) == "\n\n".join(
        (
            "max_tokens is 0\n  fix    give at least 1",
            "temperature is -1\n  fix    give 0, or a number above it",
            "top_p is 0\n  fix    give a number above 0, at most 1",
            "top_k is -1\n  fix    give 0 for all tokens, or their number",
            "repetition_penalty is 0\n  fix    give 1 for none, or a number above 0",
            "stop is ('',)\n  fix    give texts that are not empty",
        )
    )


def test_logits_that_are_not_numbers_are_an_error() -> None:
    with pytest.raises(QcError) as caught:
        Chooser(Sampling(), 1, torch.device("cpu"))(torch.tensor([[float("nan"), 0.0]]), [[]])
    assert str(caught.value) == (
        "the model's logits are not numbers (NaN)\n"
        "  fix    a weight or an activation overflows, as fp16 does above 65504: generate in fp32"
    )
