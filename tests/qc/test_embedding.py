"""A recipe that trains an encoder, from its model to its gates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import qc
from graph import QcError
from qc.assessing import assess_artifact
from qc.evaluating import evaluate_artifact
from qc.judging import judge_artifact
from runtimes.assess_settings import Assess
from tests.runtimes.train.tiny import corpus

RECIPE = """
model: encoder
passes:
  - ternary-ste: {group: 32, granularity: group}
train:
  objective: embedding
  data: {text: corpus/*.txt}
  packing: false
  steps: 12
  batch: 4
  length: 32
  lr: 5.0e-3
  plot: false
evaluate: {metrics: [embedding], batches: 1, batch: 4, length: 32}
require:
  - {metric: train/loss, op: decreased}
  - {metric: embedding/cosine, op: ">", value: 0.5}
  - {metric: embedding/spearman, op: ">", value: -1}
"""


def test_an_encoder_is_compiled_trained_and_held_to_its_gates(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel, BertTokenizer

    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "times", "is", ".", *map(str, range(300))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "encoder")
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "encoder")
    corpus(tmp_path / "corpus")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    steps = {one["step"]: one for one in qc.run(tmp_path / "recipe.yaml", runs=tmp_path / "runs")}
    assert list(steps) == ["start", "compiled", "trained", "total"]
    compiled, trained = (steps[name]["embedding/cosine"] for name in ("compiled", "trained"))
    assert 0 < compiled < trained < 1
    assert "perplexity" not in steps["trained"]
    assert steps["start"]["bits_per_weight"] == pytest.approx(32, rel=0.1)
    looked_at(Path(str(steps["trained"]["folder"])), steps["trained"])


def looked_at(artifact: Path, trained: Mapping[str, Any]) -> None:
    """By the commands for artifacts: those that need text of tokens say so."""
    said: dict[str, Any] = {"batches": 1, "batch": 4, "length": 32, "runs": artifact.parent}
    evaluated = evaluate_artifact(artifact, None, None, **said)
    assert evaluated["embedding/cosine"] == pytest.approx(trained["embedding/cosine"], abs=1e-6)
    judged = judge_artifact(artifact, None, **said)
    assert judged["embedding/spearman"] == pytest.approx(trained["embedding/spearman"], abs=1e-6)
    assert judged["text"].splitlines()[-3].startswith(f"vectors have a cosine of {trained['embedding/cosine']:.3f}")
    assert judged["text"].endswith(f"wrote {artifact.parent / 'quality'}")
    with pytest.raises(QcError) as caught:
        assess_artifact(artifact, None, Assess(batches=4, batch=4, length=32), artifact.parent)
    assert str(caught.value) == (
        "an encoder predicts no tokens, so no text is hard for it\n"
        "  fix    assess a language model; qc quality compares the vectors of an encoder"
    )
