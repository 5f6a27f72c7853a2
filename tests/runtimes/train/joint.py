"""A joint graph small enough to be trained in a blink, and questions for it. Also what each launched process runs:

``python -m tests.runtimes.train.joint FOLDER BATCH SETTINGS``
"""

from __future__ import annotations

import json
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

from graph import Graph, Selector
from graph.encoder import as_encoder
from graph.gca import GcaGate
from passes.add_lora import AddLora
from passes.attach_memory import AttachMemory
from passes.insert_gca import InsertGca
from passes.quantize_base import QuantizeBase
from passes.runner import apply, link
from runtimes.settings import Group, Retrieval, Train
from runtimes.train import Silent, TrainReport, train
from tests.runtimes.data.byte_tokenizer import byte_tokenizer
from tests.runtimes.train.launched import end_before
from tests.runtimes.train.tiny import tiny_graph

DATA = Retrieval(
    retrieval="lookup", ask="{key}:", forms=("{key} {value}",), chunks=2, entries=1, filler=0, key=1, value=1, asks=2
)
GATES = {"sigmoid": GcaGate(), "tanh": GcaGate(function="tanh", init=0.0)}


@cache
def _made(gate: str, dropout: float) -> Graph:
    graphs = {"encoder": as_encoder(tiny_graph("nothing")), "decoder": tiny_graph("nothing")}
    for graph in graphs.values():
        apply(QuantizeBase(scheme="nf4", block=32), graph, check=False)
    apply(
        AddLora(set="encoder", rank=2, dropout=dropout, select=Selector(role="attn.*")), graphs["encoder"], check=False
    )
    step = InsertGca(layers=(0, 1), gate=GATES[gate], output_dropout=dropout)
    apply(step, graphs["decoder"], check=False)
    return link(AttachMemory(), graphs, check=False)[0]


def joint_graph(gate: str = "sigmoid", dropout: float = 0.1) -> Graph:
    """An encoder with LoRA and a decoder that reads its states, over NF4 bases; a graph and tensors of its own."""
    graph = _made(gate, dropout).copy()
    for name in graph.tensors():
        graph.set_tensor(name, graph.tensor(name).detach().clone())
    return graph


def settings(**changes: Any) -> Train:
    """A short training of both."""
    groups = {"encoder": Group(select={"group": "lora.encoder"}, lr=1e-2), "gca": Group(lr=1e-2, weight_decay=0.1)}
    chosen: dict[str, Any] = {"steps": 5, "batch": 4, "length": 32, "groups": groups, "plot": False, "eval_batches": 1}
    return Train(data=DATA, **(chosen | changes))


def run(graph: Graph, folder: Path, **changes: Any) -> TrainReport:
    """Train in silence."""
    return train(graph, settings(**changes), tokenizer=byte_tokenizer(), folder=folder, progress=Silent())


def main(folder: Path, batch: int, dropout: float, stop: int | None = None, **changes: Any) -> None:
    """What each process of a launched training runs; with ``stop`` it ends where it would take that step."""
    torch.set_num_threads(1)
    if stop is not None:
        end_before(stop)
    report = run(joint_graph(dropout=dropout), folder, batch=batch, **changes)
    if os.environ.get("RANK", "0") == "0":
        (folder / "report.json").write_text(json.dumps({"resumed_from": report.resumed_from}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), **json.loads(sys.argv[3]))
