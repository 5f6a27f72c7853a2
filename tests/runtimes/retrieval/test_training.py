"""Training on questions: the joint graph learns from its chunks, resumes to the bit, and shows what moves."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from graph import Graph, QcError
from graph.encoder import as_encoder
from graph.joint import Names, join
from graph.select import Selector
from passes.add_lora import AddLora
from passes.insert_gca import InsertGca
from runtimes.retrieval import Questions
from runtimes.retrieval.attention import attention
from runtimes.retrieval.recall import recall
from runtimes.settings import Group, Retrieval, Train
from runtimes.train import TrainReport
from tests.runtimes.data.byte_tokenizer import byte_tokenizer
from tests.runtimes.train.tiny import corpus, run, settings, tiny_graph

TOKENIZER = byte_tokenizer()
DATA = Retrieval(
    retrieval="lookup", ask="{key}:", forms=("{key}:{value}",), key=1, value=1, entries=1, filler=0, chunks=2
)
GROUPS = {
    "encoder": Group(select={"group": "lora.*"}, lr=5e-3),
    "gca": Group(select={"group": "gca"}, lr=1e-2),
}


@pytest.fixture(scope="module")
def joined() -> Graph:
    encoder, decoder = as_encoder(tiny_graph("none")), tiny_graph("none")
    AddLora(rank=4, alpha=8, select=Selector(role="attn.*")).run(encoder)
    InsertGca(start=0, every_n=1).run(decoder)
    return join(encoder, decoder, Names())


@pytest.fixture
def joint(joined: Graph) -> Graph:
    return fresh(joined)


def fresh(graph: Graph) -> Graph:
    """The same with tensors of its own."""
    copied = graph.copy()
    for name in copied.tensors():
        copied.set_tensor(name, copied.tensor(name).detach().clone())
    return copied


def chosen(**changes: Any) -> Train:
    return replace(settings(DATA, steps=6, length=64, lr=None, groups=GROUPS), **changes)


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def train(graph: Graph, chosen: Train, folder: Path) -> TrainReport:
    return run(graph, chosen, folder)


def test_norms_of_both_groups_gates_and_whole_answers_are_told(joint: Graph, tmp_path: Path) -> None:
    before = {name: joint.tensor(name).detach().clone() for name in joint.tensors()}
    train(joint, chosen(eval_every=3, plot=True), tmp_path)
    told = rows(tmp_path)
    assert all(float(row["grad_norm/encoder"]) > 0 and float(row["grad_norm/gca"]) > 0 for row in told)
    gates = [name for name in joint.tensors() if name.endswith("gca.gate")]
    opened = [float(torch.sigmoid(joint.tensor(name).detach())) for name in gates]
    assert [float(told[-1][f"gate/{n}"]) for n in range(2)] == pytest.approx(opened)
    assert float(told[-1]["gate_avg"]) == pytest.approx(sum(opened) / 2)
    start = float(torch.sigmoid(before[gates[0]]))
    assert float(told[-1]["gate_moved"]) == pytest.approx(max(abs(one - start) for one in opened))
    assert [bool(row["eval_exact_match"]) for row in told] == [False, False, True, False, False, True]
    assert 0 <= float(told[-1]["eval_exact_match"]) <= 1
    assert (tmp_path / "loss.png").stat().st_size > 0
    moved = {name for name in before if not torch.equal(before[name], joint.tensor(name))}
    assert moved == {name for name, info in joint.tensors().items() if info.trainable}


def test_resumed_questions_go_on_where_they_were(joined: Graph, tmp_path: Path) -> None:
    asked = chosen(data=replace(DATA, first_chunks=1, curriculum=16, asks=2), save_every=2)
    whole = train(fresh(joined), asked, tmp_path / "whole")
    train(fresh(joined), asked, tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-6")
    parts = train(fresh(joined), asked, tmp_path / "parts")
    assert parts.resumed_from == 4
    assert parts.sha256 == whole.sha256


def test_scores_of_a_trained_graph_are_those_of_its_training(joint: Graph, tmp_path: Path) -> None:
    train(joint, chosen(batch=8), tmp_path)
    asked = Questions(DATA, "heldout", tokenizer=TOKENIZER, memory_tokenizer=TOKENIZER, length=64)
    found = recall(joint, asked, batches=2, batch=8)
    assert found["exact_match"] == pytest.approx(float(rows(tmp_path)[-1]["eval_exact_match"]))
    greedy = recall(joint, asked, batches=2, batch=8, greedy=True)
    for name in ("exact_match", "exact_match/no_memory", "exact_match/shuffled"):
        assert found[name] == greedy[name]


def test_attention_to_the_right_chunk_is_a_share_of_all(joint: Graph) -> None:
    asked = Questions(DATA, "heldout", tokenizer=TOKENIZER, memory_tokenizer=TOKENIZER, length=64)
    found = attention(joint, asked, batches=2, batch=4)
    assert found["attention/right_chunk"] == pytest.approx(0.5, abs=0.1)
    assert found["attention/top5"] == pytest.approx(5 / 6, abs=0.1)
    assert 1.5 < found["attention/entropy"] <= 1.8
    layers = [found[f"attention/right_chunk/{n}"] for n in range(2)]
    assert sum(layers) / 2 == pytest.approx(found["attention/right_chunk"])


def test_questions_need_a_model_that_reads_a_memory(tmp_path: Path) -> None:
    with pytest.raises(QcError) as caught:
        train(tiny_graph(), settings(DATA), tmp_path)
    assert str(caught.value) == (
        "the data asks questions about chunks, and the model reads no memory\n"
        "  fix    join an encoder and a decoder with attach-memory, or train on text"
    )


def test_questions_and_text_are_not_mixed(joint: Graph, tmp_path: Path) -> None:
    text = corpus(tmp_path / "text")
    for asked, what in (
        (chosen(eval_data=text), "data asks questions, and eval_data is text"),
        (chosen(data=text, eval_data=DATA), "eval_data asks questions, and data is text"),
    ):
        with pytest.raises(QcError) as caught:
            train(joint, asked, tmp_path / "out")
        assert str(caught.value) == f"{what}\n  fix    give questions in both, or in none"
