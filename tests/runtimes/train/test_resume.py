from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from graph import Graph, QcError
from runtimes.settings import TextFiles
from runtimes.train.checkpoints import Checkpoints, State
from runtimes.train.metrics import read
from runtimes.train.progress import Silent
from tests.runtimes.data.byte_tokenizer import byte_tokenizer
from tests.runtimes.train.tiny import corpus, run, settings, tiny_graph


class Stop(Exception):
    """The power goes out."""


class StopAt(Silent):
    """Stops a training right after a step, before anything is saved."""

    def __init__(self, at: int):
        self.at = at

    def step(self, row: Any) -> None:
        if row["step"] == self.at:
            raise Stop


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TextFiles:
    return corpus(tmp_path_factory.mktemp("text"))


def interrupted(graph: Graph, data: TextFiles, folder: Path, at: int, **changes: Any) -> None:
    from runtimes.train import train

    with pytest.raises(Stop):
        train(
            graph,
            settings(data, save_every=2, **changes),
            tokenizer=byte_tokenizer(),
            folder=folder,
            progress=StopAt(at),
        )


@pytest.mark.parametrize(("kills", "seed"), [(3, 1), pytest.param(10, 2, marks=pytest.mark.slow)])
def test_after_kills_at_random_moments_every_byte_is_that_of_the_undisturbed_training(
    tmp_path: Path, kills: int, seed: int
) -> None:
    command = [sys.executable, "-m", "tests.runtimes.train.killed", str(tmp_path), str(kills), str(seed)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["rough"] == said["calm"]
    assert len(said["calm"]["rows"]) == 6 * kills


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_it_goes_on_from_the_last_checkpoint(tmp_path: Path, data: TextFiles, optimizer: str) -> None:
    interrupted(tiny_graph(), data, tmp_path / "cut", at=3, optimizer=optimizer)
    cut = run(tiny_graph(), settings(data, save_every=2, optimizer=optimizer), tmp_path / "cut")
    whole = run(tiny_graph(), settings(data, save_every=2, optimizer=optimizer), tmp_path / "whole")
    assert (cut.resumed_from, whole.resumed_from) == (2, 0)
    assert cut.sha256 == whole.sha256
    assert [row["loss"] for row in read(tmp_path / "cut")] == [row["loss"] for row in read(tmp_path / "whole")]


def test_dropout_goes_on_where_it_was(tmp_path: Path, data: TextFiles) -> None:
    from passes.add_lora import AddLora

    def graph() -> Graph:
        made = tiny_graph("no such tensor")
        AddLora(rank=2, dropout=0.3).run(made)
        made.verify()
        return made

    interrupted(graph(), data, tmp_path / "cut", at=5)
    torch.manual_seed(99)
    cut = run(graph(), settings(data, save_every=2), tmp_path / "cut")
    assert cut.sha256 == run(graph(), settings(data, save_every=2), tmp_path / "whole").sha256
    assert cut.sha256 != run(graph(), settings(data, save_every=2, seed=5), tmp_path / "other").sha256


def test_a_finished_training_is_not_trained_again(tmp_path: Path, data: TextFiles) -> None:
    first, again = tiny_graph(), tiny_graph()
    once = run(first, settings(data), tmp_path)
    before = (tmp_path / "metrics.csv").read_bytes()
    twice = run(again, settings(data), tmp_path)
    assert (twice.resumed_from, twice.sha256, twice.eval_loss) == (6, once.sha256, once.eval_loss)
    assert (tmp_path / "metrics.csv").read_bytes() == before
    assert all(torch.equal(first.tensor(name), again.tensor(name)) for name in first.tensors())


def test_it_begins_afresh_if_told_to(tmp_path: Path, data: TextFiles) -> None:
    interrupted(tiny_graph(), data, tmp_path, at=3)
    assert run(tiny_graph(), settings(data, steps=4), tmp_path, resume=False).resumed_from == 0
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["best", "last", "step-4"]


def test_a_training_with_other_settings_is_not_gone_on_with(tmp_path: Path, data: TextFiles) -> None:
    interrupted(tiny_graph(), data, tmp_path, at=3)
    with pytest.raises(QcError) as caught:
        run(tiny_graph(), settings(data, clip=0.5), tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} holds a training with another clip: 1.0, not 0.5\n"
        "  fix    train in another folder, or afresh with resume=False"
    )
    other, name = tiny_graph(), "model.layers.0.mlp.up_proj.weight"
    other.set_tensor(name, other.tensor(name) + 1)
    with pytest.raises(QcError, match="holds a training with another start: "):
        run(other, settings(data), tmp_path)


def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(tmp_path: Path, data: TextFiles) -> None:
    interrupted(tiny_graph(), data, tmp_path, at=5)
    file = tmp_path / "checkpoints" / "step-4" / "optimizer.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    assert run(tiny_graph(), settings(data, save_every=2), tmp_path).resumed_from == 2


def test_if_no_checkpoint_is_whole_that_is_an_error(tmp_path: Path, data: TextFiles) -> None:
    interrupted(tiny_graph(), data, tmp_path, at=3)
    (tmp_path / "checkpoints" / "step-2" / "trained.safetensors").unlink()
    with pytest.raises(QcError) as caught:
        run(tiny_graph(), settings(data, save_every=2), tmp_path)
    assert str(caught.value) == (
        f"no checkpoint in {tmp_path / 'checkpoints'} is whole: files are missing or changed\n"
        "  fix    restore them, or train afresh with resume=False or in another folder"
    )


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_a_full_disk_is_an_error_and_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    checkpoints, tensors = Checkpoints(tmp_path, keep=2), {"trained": {"w": torch.ones(3)}, "optimizer": {}}
    checkpoints.start(fresh=False)
    checkpoints.save(State(step=1), tensors, periodic=True)
    real, calls = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(QcError) as caught:
        checkpoints.save(State(step=2), tensors, periodic=True)
    assert str(caught.value) == (
        f"the disk is full: the checkpoint of step 2 did not fit into {tmp_path}\n"
        "  fix    free some space and run it again; it goes on from the last checkpoint"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last", "step-1"]
    found = checkpoints.newest()
    assert found is not None
    assert found[1].step == 1


def test_what_a_killed_run_left_half_written_is_cleared_away(tmp_path: Path, data: TextFiles) -> None:
    for name in ("checkpoints/.step-2.77.tmp", "data/.abc.77.tmp"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "trained.safetensors").write_bytes(b"half")
    (tmp_path / ".metrics.csv.77.tmp").write_text("half")
    run(tiny_graph(), settings(data, steps=1), tmp_path)
    assert not list(tmp_path.rglob(".*.tmp"))


def test_nothing_is_pickled(tmp_path: Path, data: TextFiles) -> None:
    run(tiny_graph(), settings(data, ema=0.9), tmp_path)
    kinds = {p.suffix for p in (tmp_path / "checkpoints").rglob("*") if p.is_file()}
    assert kinds == {".safetensors", ".json"}
