"""A teacher small enough to be asked in a blink, and caches of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graph import Graph
from runtimes.distill.writer import Made, Source, make
from runtimes.settings import Cache, Data
from tests.runtimes.data.byte_tokenizer import byte_tokenizer
from tests.runtimes.train.tiny import corpus, tiny_graph

VOCABULARY = 264


def settings(data: Data, **changes: Any) -> Cache:
    """A cache of a few short sequences, in several shards."""
    chosen: dict[str, Any] = {"sequences": 21, "heldout": 3, "length": 24, "topk": 5, "shard": 8, "batch": 3}
    return Cache(data=data, **(chosen | changes))


def write(folder: Path, chosen: Cache, **changes: Any) -> Made:
    """Make a cache in silence."""
    source = {
        "graph": tiny_graph, "dtype": "fp32", "tokenizer": byte_tokenizer(), "model": "tiny", "teacher": "0",
        "root": Path(), "tokens": folder.parent / "tokens",
    }  # fmt: skip
    options: dict[str, Any] = {"seed": 0, "force": False, "tell": lambda text: None}
    options |= {key: changes.pop(key) for key in list(changes) if key in options}
    return make(chosen, Source(**(source | changes)), folder, **options)


def texts(folder: Path, files: int = 60) -> Data:
    """Text to ask about."""
    return corpus(folder, files)


def other_graph() -> Graph:
    """A graph to train that is not the teacher."""
    graph = tiny_graph("mlp")
    for name in graph.tensors():
        if "mlp.down" in name:
            graph.set_tensor(name, graph.tensor(name) * -40)
    return graph
