"""Perplexity, divergence and agreement: against transformers, against their definitions, on every token once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from graph import Graph, QcError, capture
from runtimes import evaluate as module
from runtimes.evaluate import IGNORED, Batch, Window, evaluate, windows
from tests.architectures import config


@cache
def model() -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config("qwen3")).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return made


@cache
def graph() -> Graph:
    return capture(model())


@cache
def worse() -> Graph:
    """The same model, its weights moved."""
    moved = graph().copy()
    for name in moved.tensors():
        value = moved.tensor(name).detach()
        if name.endswith("proj.weight"):
            moved.set_tensor(name, value + 0.05 * torch.randn(value.shape))
    return moved


def documents(*lengths: int) -> list[list[int]]:
    return [torch.randint(5, 99, (length,)).tolist() for length in lengths]


def reference_loss(docs: list[list[int]]) -> float:
    """Mean negative log-likelihood of every token but the first of its document, each document read whole."""
    losses = []
    with torch.no_grad():
        for document in docs:
            ids = torch.tensor([document])
            logits = model()(ids).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    return torch.cat(losses).double().mean().item()


def test_perplexity_is_that_of_transformers_over_all_tokens() -> None:
    docs = documents(9, 30, 17, 2)
    found = evaluate(graph(), windows(docs, length=32, batch=2))
    assert found["tokens"] == 8 + 29 + 16 + 1
    assert found["loss"] == pytest.approx(reference_loss(docs), abs=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert set(found) == {"tokens", "loss", "perplexity"}


@pytest.mark.parametrize(("length", "stride"), [(8, 4), (8, 7), (8, 1), (5, None), (2, 1), (64, 32)])
def test_windows_measure_every_token_but_the_first_once(length: int, stride: int | None) -> None:
    docs = [list(range(100, 100 + n)) for n in (1, 2, 7, 8, 9, 23)]
    wanted = [token for document in docs for token in document[1:]]
    found: list[int] = []
    step = length // 2 if stride is None else stride
    for batch in windows(docs, length=length, stride=stride, batch=3):
        assert batch.input_ids.shape[1] <= length
        for row, at in (batch.labels != IGNORED).nonzero().tolist():
            token = int(batch.labels[row, at])
            found.append(token)
            assert at + 1 >= min(length - step, token - 100)  # the tokens before it that the row has
            assert int(batch.input_ids[row, at]) == token - 1
    assert sorted(found) == sorted(wanted)


def test_overlapping_windows_cost_no_token() -> None:
    docs = documents(40)
    whole = evaluate(graph(), windows(docs, length=40, batch=1))
    strided = evaluate(graph(), windows(docs, length=20, stride=5, batch=4))
    assert whole["tokens"] == strided["tokens"] == 39
    assert whole["loss"] == pytest.approx(reference_loss(docs), abs=1e-6)


def packed(docs: list[list[int]]) -> Window:
    """All documents in one row, numbered."""
    ids = torch.tensor([[token for document in docs for token in document] + [0, 0]])
    mask = torch.tensor([[n for n, document in enumerate(docs, 1) for _ in document] + [0, 0]])
    labels = torch.full_like(ids, IGNORED)
    inside = (mask[:, 1:] == mask[:, :-1]) & (mask[:, 1:] > 0)
    labels[:, :-1] = torch.where(inside, ids[:, 1:], IGNORED)
    return Window(ids, mask, labels)


def test_documents_packed_into_one_row_stay_apart() -> None:
    docs = documents(7, 12, 5)
    found = evaluate(graph(), [packed(docs)])
    assert found["tokens"] == 6 + 11 + 4
    assert found["loss"] == pytest.approx(reference_loss(docs), abs=1e-5)


def test_a_batch_counts_by_its_tokens_not_by_itself() -> None:
    docs = documents(30, 3)
    found = evaluate(graph(), windows(docs, length=32, batch=1))
    assert found["loss"] == pytest.approx(reference_loss(docs), abs=1e-6)


def test_divergence_and_agreement_are_what_they_are_defined_as() -> None:
    docs = documents(20, 11)
    found = evaluate(
        worse(), windows(docs, length=32, batch=4), reference=graph(), metrics=("perplexity", "kl", "top1")
    )
    divergences, agreements = [], []
    for document in docs:
        ids = torch.tensor([document])
        with torch.no_grad():
            p, q = (torch.softmax(g(input_ids=ids)[0, :-1].double(), -1) for g in (graph(), worse()))
        divergences.append((p * (p / q).log()).sum(-1))
        agreements.append((p.argmax(-1) == q.argmax(-1)).double())
    assert found["kl"] == pytest.approx(torch.cat(divergences).mean().item(), rel=1e-4)
    assert found["top1"] == pytest.approx(torch.cat(agreements).mean().item())
    assert found["kl"] > 0
    assert found["top1"] < 1


def test_a_graph_does_not_differ_from_itself() -> None:
    found = evaluate(graph(), windows(documents(20), length=32), reference=graph(), metrics=("kl", "top1"))
    assert found == {"tokens": 19, "kl": 0.0, "top1": 1.0}


def test_looking_at_few_logits_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    docs = documents(20, 11)
    metrics: Any = ("perplexity", "kl", "top1")
    whole = evaluate(worse(), windows(docs, length=32), reference=graph(), metrics=metrics)
    monkeypatch.setattr(module, "CHUNK", 99 * 3)
    assert evaluate(worse(), windows(docs, length=32), reference=graph(), metrics=metrics) == pytest.approx(whole)


def test_batches_are_taken_one_at_a_time() -> None:
    alive = 0

    class Counted(Window):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def stream() -> Iterator[Batch]:
        nonlocal alive
        for batch in windows(documents(*[9] * 6), length=16, batch=1):
            alive += 1
            assert alive <= 2  # this one, and the one that evaluate still holds
            yield Counted(batch.input_ids, batch.attention_mask, batch.labels)

    assert evaluate(graph(), stream())["tokens"] == 48


def test_bits_per_byte_are_there_where_the_bytes_are_known() -> None:
    docs = documents(12)
    found = evaluate(graph(), windows(docs, length=16), text_bytes=30)
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * 11 / math.log(2) / 30)


def test_the_graph_is_not_trained_by_being_measured() -> None:
    before = {name: graph().tensor(name).clone() for name in graph().tensors()}
    evaluate(graph(), windows(documents(9), length=16))
    assert all(torch.equal(before[name], graph().tensor(name)) for name in before)


# -- errors ---------------------------------------------------------------------------------------------------------


def narrower() -> Graph:
    made = graph().copy()
    head: Tensor = made.tensor("model.embed_tokens.weight").detach()
    end = made.site("lm_head")
    from graph import TensorInfo

    node = made.add_tensor("head", head[:50].clone(), before=end.node, info=TensorInfo())
    end.set_input(1, node)
    made.propagate()
    return made


def test_what_cannot_be_measured_is_an_error() -> None:
    rows = list(windows(documents(9), length=16))
    encoder = graph().copy()
    encoder.kind = "encoder"
    silent = [Window(rows[0].input_ids, rows[0].attention_mask, torch.full_like(rows[0].labels, IGNORED))]
    wrong: Any = ("perplexityy",)
    cases = [
        (lambda: evaluate(graph(), rows, metrics=wrong), "no metric is called 'perplexityy'\n  fix    use some of perplexity, kl, top1"),
        (lambda: evaluate(graph(), rows, metrics=()), "no metric is asked for\n  fix    use some of perplexity, kl, top1"),
        (lambda: evaluate(graph(), rows, metrics=("kl",)), "kl compares with a reference, and there is none\n  fix    give a reference, or leave it out"),
        (lambda: evaluate(encoder, rows), "an encoder predicts no tokens, so it has no perplexity\n  fix    ask for metrics: [embedding], and train with objective: embedding"),
        (lambda: evaluate(graph(), silent), "the data has nothing to measure\n  fix    give more held-out text, or longer rows"),
        (lambda: evaluate(graph(), rows, reference=narrower(), metrics=("kl",)), "the graph knows 99 tokens and the reference 50\n  fix    compare models of one vocabulary"),
        (lambda: list(windows(documents(9), length=8, stride=8)), "windows of 8 tokens 8 apart leave tokens out\n  fix    give a stride from 1 to length - 1"),
    ]  # fmt: skip
    for call, text in cases:
        with pytest.raises(QcError) as caught:
            call()
        assert str(caught.value) == text
