"""Small exports for the Neural Engine: random models, written once for a module of tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from graph import Graph, capture
from runtimes.export.ane import export
from tests.runtimes.test_export_safetensors import tokenizer_folder


def decoder_graph(**changes: Any) -> Graph:
    """A Qwen3 of two blocks with random weights."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "intermediate_size": 96, "vocab_size": 100, "tie_word_embeddings": True, "max_position_embeddings": 64,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(Qwen3Config(**(settings | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return capture(model, kind="causal-lm")


def encoder_graph() -> Graph:
    """A BERT of two blocks with random weights."""
    from transformers import AutoModel, BertConfig

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=100
    )
    model = AutoModel.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return capture(model, kind="encoder")


def write(graph: Graph, folder: Path, **options: Any) -> Path:
    """Export with a tokenizer, context 32 and blocks of 8."""
    given: dict[str, Any] = {"context": 32, "prefill": 8} if graph.kind == "causal-lm" else {"lengths": (8, 16)}
    source = tokenizer_folder(folder / "source")
    export(graph, folder / "out", source=source, calibration=0, **(given | options))
    return folder / "out"
