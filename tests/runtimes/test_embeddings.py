"""Vectors of texts, and how far those of two encoders are apart."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from graph import Graph, QcError
from graph.encoder import as_encoder
from runtimes.data import Batch
from runtimes.embeddings import compare, pooled
from runtimes.settings import Pooling
from tests.runtimes.train.tiny import tiny_graph

STATES = torch.tensor([[[1.0, -2.0], [3.0, 4.0], [9.0, 9.0]], [[5.0, 6.0], [7.0, 8.0], [-9.0, 9.0]]])
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])


def batches(count: int = 2) -> Iterator[Batch]:
    for seed in range(count):
        ids = torch.randint(0, 200, (4, 12), generator=torch.Generator().manual_seed(seed))
        yield Batch(ids, torch.ones_like(ids), ids)


def moved(by: float) -> Graph:
    graph = as_encoder(tiny_graph())
    torch.manual_seed(0)
    for name, info in graph.tensors().items():
        if info.role.startswith("mlp"):
            graph.set_tensor(name, graph.tensor(name) + by * torch.randn(graph.shape(name)))
    return graph


@pytest.mark.parametrize(
    ("pooling", "wanted"),
    [
        ("mean", [[2.0, 1.0], [1.0, 23 / 3]]),
        ("cls", [[1.0, -2.0], [5.0, 6.0]]),
        ("max", [[3.0, 4.0], [7.0, 9.0]]),
    ],
)
def test_a_text_is_pooled_without_its_padding(pooling: Pooling, wanted: list[list[float]]) -> None:
    assert torch.allclose(pooled(STATES, MASK, pooling), torch.tensor(wanted))


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_a_row_without_text_is_zero(pooling: Pooling) -> None:
    found: Tensor = pooled(STATES, MASK * 0, pooling)
    assert found.abs().max() == 0


def test_an_encoder_agrees_with_itself_and_less_with_one_that_was_moved_further() -> None:
    original = as_encoder(tiny_graph())
    same, near, far = (compare(moved(by), original, batches()) for by in (0.0, 0.02, 0.3))
    assert same == {"embedding/cosine": pytest.approx(1.0), "embedding/spearman": pytest.approx(1.0)}
    assert 1.0 > near["embedding/cosine"] > far["embedding/cosine"]
    assert 1.0 > near["embedding/spearman"] > far["embedding/spearman"]


def test_two_texts_have_no_order_to_compare() -> None:
    graph = as_encoder(tiny_graph())
    ids = torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(QcError) as caught:
        compare(graph, graph, [Batch(ids, torch.ones_like(ids), ids)])
    assert str(caught.value) == "the data has fewer than three texts to compare\n  fix    give more held-out text"


def test_a_language_model_makes_no_vectors() -> None:
    with pytest.raises(QcError) as caught:
        compare(tiny_graph(), tiny_graph(), batches())
    assert str(caught.value) == (
        "a language model makes no vectors of texts\n  fix    ask for perplexity, kl or top1 instead"
    )
