"""Two processes on the CPU, launched as a user launches them, beside one process with twice the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtimes.train.checkpoints import load
from runtimes.train.metrics import read

LAUNCH = (
    "-m",
    "accelerate.commands.launch",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
)
TWO = ("--num_processes", "2", "--main_process_port", "0")
WAYS = {"ddp": ("--multi_gpu",), "fsdp": ("--use_fsdp", "--fsdp_version", "2")}


def launched(folder: Path, batch: int, launch: tuple[str, ...] = (), **changes: object) -> None:
    command = [
        sys.executable,
        *launch,
        "-m",
        "tests.runtimes.train.launched",
        str(folder),
        str(batch),
        json.dumps(changes),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_do_what_one_does_with_twice_the_batch(tmp_path: Path, way: str) -> None:
    launched(tmp_path / "one", batch=4, steps=4, ema=0.5)
    launched(tmp_path / "two", 2, (*LAUNCH, *TWO, *WAYS[way]), steps=4, ema=0.5)
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    for key in ("loss", "grad_norm", "eval_loss"):
        assert [r[key] for r in two if key in r] == pytest.approx([r[key] for r in one if key in r], abs=2e-6)
    assert [row["tokens"] for row in two] == [row["tokens"] for row in one]
    for stem in ("trained", "average", "optimizer"):
        wanted = load(tmp_path / "one" / "checkpoints" / "last", stem)
        found = load(tmp_path / "two" / "checkpoints" / "last", stem)
        assert wanted.keys() == found.keys()
        assert all(wanted[name].shape == found[name].shape for name in wanted)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_what_two_processes_began_one_can_finish(tmp_path: Path, way: str) -> None:
    launched(tmp_path / "one", batch=4, steps=4)
    launched(tmp_path / "both", 2, (*LAUNCH, *TWO, *WAYS[way]), steps=4, stop=3)
    launched(tmp_path / "both", batch=4, steps=4)
    one, both = read(tmp_path / "one"), read(tmp_path / "both")
    assert json.loads((tmp_path / "both" / "report.json").read_text())["resumed_from"] == 2
    assert [row["loss"] for row in both] == pytest.approx([row["loss"] for row in one], abs=2e-6)
