"""Encoder and decoder train together in the one loop: what moves, what does not, and in however many processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from graph import Graph
from graph.hashes import tensor_sha256
from passes.degrade import Degrade
from passes.runner import apply
from runtimes.data import Batch
from runtimes.settings import PythonStdlib
from runtimes.train.checkpoints import load
from runtimes.train.distribute import Processes
from runtimes.train.groups import members, optimizer
from runtimes.train.metrics import read
from runtimes.train.student import Student
from tests.runtimes.train.joint import joint_graph, run, settings
from tests.runtimes.train.test_distribution import LAUNCH, TWO, WAYS
from tests.runtimes.train.tiny import tiny_graph


def hashes(graph: Graph) -> dict[str, str]:
    return {name: tensor_sha256(graph.tensor(name)) for name in graph.tensors()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Graph, Graph, Path]:
    """The graph before five steps and after them, and where the training lies."""
    before, after, folder = joint_graph(), joint_graph(), tmp_path_factory.mktemp("joint")
    run(after, folder)
    return before, after, folder


def test_after_five_steps_what_trains_has_moved_and_nothing_else(trained: tuple[Graph, Graph, Path]) -> None:
    before, after, _ = trained
    old, new = hashes(before), hashes(after)
    moved = {name for name in old if old[name] != new[name]}
    assert moved == {name for name, info in before.tensors().items() if info.trainable}
    assert any(name.startswith("encoder.") for name in moved)
    assert "decoder.model.layers.0.gca.gate" in moved


def test_both_groups_have_gradients_in_every_step_and_the_gates_are_told(trained: tuple[Graph, Graph, Path]) -> None:
    rows = read(trained[2])
    assert all(row["grad_norm/encoder"] > 0 and row["grad_norm/gca"] > 0 for row in rows[1:])
    assert rows[0]["grad_norm/gca"] > 0
    assert rows[0]["gate_avg"] == pytest.approx(0.269, abs=0.005)
    assert rows[-1]["gate_moved"] > 0


def test_behind_a_closed_tanh_gate_the_encoder_has_no_gradient_at_first(tmp_path: Path) -> None:
    run(joint_graph("tanh"), tmp_path, steps=2)
    first, second = read(tmp_path)
    assert first["grad_norm/encoder"] == 0
    assert first["grad_norm/gca"] > 0
    assert second["loss"] > 0


def test_no_gate_norm_or_bias_decays() -> None:
    graph = joint_graph()
    parameters = {name: p for name, p in graph.module.named_parameters() if p.requires_grad}
    made = optimizer(members(graph, settings()), parameters, graph, "adamw")
    decaying = {name for entry in made.param_groups if entry["weight_decay"] for name in entry["names"]}
    assert decaying
    assert all(name.endswith("_proj.weight") and ".gca." in name for name in decaying)


def test_a_training_that_was_stopped_ends_in_the_same_bytes(tmp_path: Path, trained: tuple[Graph, Graph, Path]) -> None:
    from runtimes.train import train
    from tests.runtimes.data.byte_tokenizer import byte_tokenizer
    from tests.runtimes.train.test_resume import Stop, StopAt

    with pytest.raises(Stop):
        train(joint_graph(), settings(save_every=2), tokenizer=byte_tokenizer(), folder=tmp_path, progress=StopAt(4))
    graph = joint_graph()
    assert run(graph, tmp_path).resumed_from == 2
    assert hashes(graph) == hashes(trained[1])


def test_a_degraded_base_is_itself_again_in_the_end(tmp_path: Path) -> None:
    graph = tiny_graph()
    apply(Degrade(until=0.5), graph, check=False)
    student = Student(graph, replace(settings(), data=PythonStdlib()), Processes(tmp_path, ()))
    ids = torch.arange(12).reshape(2, 6)
    batch = Batch(ids, torch.ones_like(ids), ids)
    with torch.no_grad():
        whole = student(batch, training=False).x
        at_first = student(batch, training=True, progress=0.0).x
        in_the_end = student(batch, training=True, progress=0.5).x
    assert torch.equal(in_the_end, whole)
    assert (at_first - whole).abs().max() > 0.01


def launched(folder: Path, processes: int, **changes: Any) -> None:
    """Train the joint graph in as many processes, on four rows a step in all."""
    launch = (*LAUNCH, *TWO, *WAYS["ddp"]) if processes == 2 else ()
    said = json.dumps({"steps": 4, "save_every": 2, "dropout": 0.0} | changes)
    command = [sys.executable, *launch, "-m", "tests.runtimes.train.joint", str(folder), str(4 // processes), said]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def trained_values(folder: Path) -> dict[str, torch.Tensor]:
    return load(folder / "checkpoints" / "last", "trained")


@pytest.mark.slow
def test_two_processes_train_both_as_one_does_with_twice_the_batch_and_resume_to_the_bit(tmp_path: Path) -> None:
    launched(tmp_path / "one", 1)
    launched(tmp_path / "two", 2)
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    assert [row["tokens"] for row in two] == [row["tokens"] for row in one]
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], abs=2e-5)
    wanted, found = trained_values(tmp_path / "one"), trained_values(tmp_path / "two")
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], value, atol=1e-3) for name, value in wanted.items())
    launched(tmp_path / "parts", 2, stop=3)
    launched(tmp_path / "parts", 2)
    assert json.loads((tmp_path / "parts" / "report.json").read_text()) == {"resumed_from": 2}
    again = trained_values(tmp_path / "parts")
    assert all(torch.equal(again[name], value) for name, value in found.items())


@pytest.mark.slow
def test_dropout_differs_from_process_to_process_and_comes_again_when_resumed(tmp_path: Path) -> None:
    launched(tmp_path / "whole", 2, dropout=0.1)
    launched(tmp_path / "parts", 2, dropout=0.1, stop=3)
    launched(tmp_path / "parts", 2, dropout=0.1)
    wanted, found = trained_values(tmp_path / "whole"), trained_values(tmp_path / "parts")
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
