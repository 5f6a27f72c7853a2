"""A small project for the tests of the front door."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.blocks import ROOT
from tests.qc.command import python

TINY = """
from transformers import Qwen3Config, Qwen3ForCausalLM
from tests.runtimes.data.byte_tokenizer import byte_tokenizer
import torch
torch.manual_seed(0)
tokenizer = byte_tokenizer()
config = Qwen3Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    intermediate_size=128, vocab_size=len(tokenizer), tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id)
Qwen3ForCausalLM(config).save_pretrained("tiny")
tokenizer.save_pretrained("tiny")
"""

RECIPE = """
model: tiny
stages:
  - name: tune
    passes:
      - quantize-base: {scheme: nf4}
      - add-lora: {rank: 2, alpha: 4}
        name: lora
    train: {data: {text: corpus/*.txt}, steps: 2, batch: 2, length: 16, lr: 1.0e-3, plot: false}
  - name: merge
    passes:
      - merge-lora: {into: dequantized}
    export:
      - {target: safetensors, dtype: fp16}
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Qwen3, a corpus and recipes."""
    folder = tmp_path_factory.mktemp("project")
    done = python(TINY, cwd=folder, path=[ROOT])
    assert done.code == 0, done.both
    (folder / "corpus").mkdir()
    for number in range(4):
        (folder / f"corpus/{number}.txt").write_text(f"text number {number}, and nothing else\n" * 20)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder
