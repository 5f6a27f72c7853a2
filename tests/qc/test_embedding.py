"""A recipe that trains an encoder, from its model to its gates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qc
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
