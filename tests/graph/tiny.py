"""A tiny tied Qwen3, captured once."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from graph import Graph, capture


@cache
def model(layers: int = 2) -> Any:
    """Random weights, none of them zero or one."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    config = Qwen3Config(**sizes, num_hidden_layers=layers, vocab_size=50, tie_word_embeddings=True)
    made = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return made


@cache
def _captured(layers: int) -> Graph:
    return capture(model(layers))


def qwen(layers: int = 2) -> Graph:
    """A graph of its own nodes, over tensors that all tests share."""
    return _captured(layers).copy()


def checkpoint(folder: Path, layers: int = 2) -> Path:
    """The model as transformers saves it."""
    model(layers).save_pretrained(folder)
    return folder
