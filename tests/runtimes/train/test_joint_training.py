"""Encoder and decoder train together in the one loop: what moves, what does not, and in however many processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from graph import Graph
from graph.weights import tensor_sha256
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


@pytest.mark.slow
def test_two_processes_train_both_as_one_does_with_twice_the_batch(tmp_path: Path) -> None:
    changes = json.dumps({"steps": 3})
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    for folder, batch, launch in (("one", "4", ()), ("two", "2", (*LAUNCH, *TWO, *WAYS["ddp"]))):
        command = [sys.executable, *launch, "-m", "tests.runtimes.train.joint", str(tmp_path / folder), batch, changes]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    assert [row["tokens"] for row in two] == [row["tokens"] for row in one]
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], abs=0.2), "dropout differs from process to process"
    wanted, found = (load(tmp_path / folder / "checkpoints" / "last", "trained") for folder in ("one", "two"))
    assert {name: value.shape for name, value in found.items()} == {name: value.shape for name, value in wanted.items()}
