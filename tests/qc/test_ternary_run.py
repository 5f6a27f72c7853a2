"""The ternary recipes on the shipped model, with a training of a few steps: what is trained, spared, stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.qc.command import Done, qc

pytestmark = pytest.mark.slow

SHORT = (
    "recover.train.steps=3", "recover.train.eval_every=1", "recover.train.batch=2", "recover.train.length=64",
    "recover.evaluate.batches=1", "quantized.evaluate.batches=1", "calibrate.tokens=1024",
)  # fmt: skip


def run(folder: Path, recipe: str, *said: str) -> tuple[Done, dict[str, dict[str, float]]]:
    options = [word for one in (*SHORT, *said) for word in ("--set", one)]
    done = qc("run", recipe, *options, "--json", cwd=folder)
    steps = json.loads(done.out).get("steps", []) if done.out else []
    return done, {step["step"]: step for step in steps}


@pytest.mark.parametrize("recipe", ["ternary-speed", "ternary", "ternary-quality"])
def test_every_preset_goes_from_text_to_files_that_are_verified(tmp_path: Path, recipe: str) -> None:
    done, steps = run(tmp_path, recipe)
    assert done.code == 0, done.err
    assert "recover: perplexity grew by " in done.err and ", more than 5.00%" in done.err
    assert steps["recover/trained"]["perplexity"] != steps["recover/compiled"]["perplexity"]
    exported = steps["quantized/export ternary fp16"]
    assert exported["dequant_fidelity"] >= 0.995
    (record,) = tmp_path.glob("runs/*/*/quantized/export-ternary-fp16/ternary.json")
    assert abs(json.loads(record.read_text())["figures"]["formula_error"]) < 0.01


def test_what_is_near_enough_is_not_trained(tmp_path: Path) -> None:
    done, steps = run(tmp_path, "ternary", "recover.train.when=perplexity_increase > 1000 %")
    assert done.code == 0, done.err
    assert "recover: not trained: perplexity_increase > 1000 % does not hold" in done.err
    assert steps["recover/trained"]["perplexity"] == steps["recover/compiled"]["perplexity"]


def test_a_training_that_runs_away_ends_with_its_best_checkpoint(tmp_path: Path) -> None:
    wild = (
        "recover.train.groups.weights.lr=3.0", "recover.train.groups.weights.warmup=0", "recover.train.steps=12",
        "recover.train.clip=null", "recover.train.divergence.window=2",
    )  # fmt: skip
    done, _ = run(tmp_path, "ternary", *wild)
    assert done.code == 0, done.err
    assert "the loss runs away" in done.err and "of the checkpoints" in done.err
    rows = next(iter(tmp_path.glob("runs/*/*/recover/train/metrics.jsonl"))).read_text().splitlines()
    assert 3 <= len(rows) < 12
