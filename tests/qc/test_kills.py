"""A run that is killed again and again gives the bytes of a run that is left alone."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from graph.hashes import sha256
from tests.qc.command import answer, killed, qc

RECIPE = """
model: tiny
stages:
  - name: tune
    passes:
      - quantize-base: {scheme: nf4}
      - add-lora: {rank: 2, alpha: 4, dropout: 0.1}
        name: lora
    train:
      data: {text: corpus/*.txt}
      steps: 40
      save_every: 3
      eval_every: 10
      batch: 2
      length: 16
      lr: 1.0e-3
      plot: false
  - name: merge
    passes:
      - merge-lora: {into: dequantized}
    export:
      - {target: safetensors, dtype: fp16}
"""

CAPTURE = ("runs/killed/*/run.json", 1.0)
COMPILE = ("runs/killed/*/tune/.compiled.tmp-*", 0.02)
TRAIN = ("runs/killed/*/tune/train/checkpoints/.?*", 0.1)
TRAINED = ("runs/killed/*/tune/.trained.tmp-*", 0.02)
EXPORT = ("runs/killed/*/merge/.export-safetensors-fp16.tmp-*", 0.02)
"""What shows that a run has got to a part of its work, and the longest time it is then left."""


@pytest.mark.parametrize(
    "kills",
    [
        [COMPILE, TRAIN, EXPORT],
        pytest.param(
            [CAPTURE, COMPILE, COMPILE, COMPILE, TRAIN, TRAIN, TRAIN, TRAINED, EXPORT, EXPORT], marks=pytest.mark.slow
        ),
    ],
    ids=len,
)
def test_kills_in_compile_train_and_export_leave_the_bytes_of_an_undisturbed_run(
    folder: Path, tmp_path: Path, kills: list[tuple[str, float]]
) -> None:
    calm, rough, chance = tmp_path / "calm", tmp_path / "rough", random.Random(len(kills))
    for project in (calm, rough):
        for part in ("tiny", "corpus"):
            shutil.copytree(folder / part, project / part)
        (project / "killed.yaml").write_text(RECIPE)
    answer(qc("run", "killed.yaml", "--json", cwd=calm))
    for nth, (sign, longest) in enumerate(kills):
        delay = longest * chance.random()
        assert killed("run", "killed.yaml", cwd=rough, sign=sign, delay=delay), f"kill {nth} ({sign}) came too late"
    answer(qc("run", "killed.yaml", "--json", cwd=rough))
    assert weights(rough) == weights(calm)
    assert len(weights(calm)) == 4, "compiled, trained, merged and exported"
    left = [p.relative_to(rough) for p in rough.rglob(".*.tmp-*")]
    assert not left, "what killed processes left is swept up"


def weights(project: Path) -> dict[str, str]:
    """The sha256 of every weight file outside of checkpoints, by its place in the run."""
    (run,) = (project / "runs/killed").iterdir()
    found = sorted(p for p in run.rglob("*.safetensors") if "checkpoints" not in p.parts)
    return {str(p.relative_to(run)): sha256(p) for p in found}
