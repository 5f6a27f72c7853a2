"""A causal language model small enough to be trained in a blink, and text for it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

from graph import Graph, capture
from runtimes.settings import Data, TextFiles, Train
from runtimes.train import Silent, TrainReport, train
from tests.runtimes.data.byte_tokenizer import byte_tokenizer


def tiny_graph(trainable: str = "mlp", tied: bool = True) -> Graph:
    """A random Qwen3 of two blocks over bytes; tensors with ``trainable`` in their name are trained."""
    graph = _captured(tied).copy()
    for name, info in graph.tensors().items():
        graph.set_tensor(name, graph.tensor(name).detach().clone())
        if trainable in name and info.kind == "parameter":
            graph.set_info(name, trainable=True)
    return graph


@cache
def _captured(tied: bool) -> Graph:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(1)
    config = Qwen3Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=64, vocab_size=264, tie_word_embeddings=tied,
    )  # fmt: skip
    return capture(Qwen3ForCausalLM(config))


def corpus(folder: Path, files: int = 40) -> TextFiles:
    """Text files of various lengths that have something to learn in them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        lines = [f"{k} times {number} is {k * number}." for k in range(1, 3 + number % 7)]
        (folder / f"{number:02}.txt").write_text("\n".join(lines))
    return TextFiles(text=str(folder / "*.txt"))


def settings(data: Data, **changes: Any) -> Train:
    """A short training."""
    chosen: dict[str, Any] = {"steps": 6, "batch": 4, "length": 32, "lr": 1e-2, "plot": False, "eval_batches": 2}
    return Train(data=data, **(chosen | changes))


def run(graph: Graph, chosen: Train, folder: Path, **options: Any) -> TrainReport:
    """Train in silence."""
    return train(graph, chosen, tokenizer=byte_tokenizer(), folder=folder, progress=Silent(), **options)
