"""``qc eval`` of an artifact that is made of two models: what it looks up, and how far it is from another."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import qc
from graph.artifact import load
from graph.errors import QcError
from qc.evaluating import evaluate_artifact
from qc.measuring import weights_of

RECIPE = """
models:
  encoder: {{model: {model}, kind: encoder}}
  decoder: {{model: {model}}}
stages:
  - name: packed
    passes:
      - quantize-base: {{scheme: nf4}}
        on: "*"
      - add-lora: {{set: encoder, rank: 2}}
        on: encoder
      - insert-gca: {{start: 0, every_n: 1}}
        on: decoder
      - attach-memory: {{}}
  - name: dequantized
    passes: [{{swap-base: {{to: dequantized}}}}, {{merge-lora: {{}}}}]
    evaluate:
      data: {{retrieval: lookup, chunks: 2, entries: 1, filler: 0, key: 1, value: 1, forms: ["{{key}}:{{value}}"], ask: "{{key}}:"}}
      metrics: [retrieval]
      batches: 1
      batch: 4
      length: 16
"""


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two stages."""
    where = tmp_path_factory.mktemp("joint")
    (where / "joint.yaml").write_text(RECIPE.format(model=folder / "tiny"))
    qc.run(where / "joint.yaml", runs=where / "runs")
    (found,) = (where / "runs" / "joint").iterdir()
    return found


def test_questions_of_the_recipe_are_asked(run: Path, folder: Path) -> None:
    artifact = run / "dequantized" / "compiled"
    found = evaluate_artifact(artifact, None, None, 2, 4, 16, run.parent.parent)
    assert {"tokens", "loss", "perplexity", "exact_match", "exact_match/no_memory", "memory_contribution"} <= set(found)
    assert not {"kl", "top1"} & set(found), "there is no one model that it came from"
    assert found["questions"] == 8
    sizes = sum(path.stat().st_size for path in artifact.glob("*.safetensors"))
    assert found["bits_per_weight"] == pytest.approx(8 * sizes / (2 * weights_of(str(folder / "tiny"))))


def test_another_artifact_is_what_it_is_compared_with(run: Path) -> None:
    trained, merged = (run / stage / "compiled" for stage in ("packed", "dequantized"))
    found = evaluate_artifact(merged, str(trained), None, 2, 4, 16, run.parent.parent)
    assert found["top1"] == 1.0
    assert found["kl"] <= 1e-6


def test_what_it_cannot_be_compared_with_or_asked(run: Path, folder: Path, tmp_path: Path) -> None:
    artifact = run / "dequantized" / "compiled"
    with pytest.raises(QcError) as caught:
        evaluate_artifact(artifact, str(folder / "tiny"), None, 1, 4, 16, tmp_path)
    assert str(caught.value) == (
        f"{folder / 'tiny'} is a model, and {artifact} is made of two\n"
        "  fix    give another artifact of the recipe as the reference"
    )
    alone = tmp_path / "alone"
    shutil.copytree(artifact, alone)
    assert load(alone).graph.blocks == 4
    with pytest.raises(QcError) as caught:
        evaluate_artifact(alone, None, None, 1, 4, 16, tmp_path)
    assert str(caught.value) == (
        f"{alone} lies in no run, and without its recipe nobody knows what it is to be asked\n"
        "  fix    give the artifact in the folder of its run"
    )
