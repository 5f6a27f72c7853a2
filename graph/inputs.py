"""How large what a linear reads becomes, seen on text: static scales and NVFP4's global scales of inputs follow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from graph.core import Graph, Streaming
from graph.sites import node_name


def largest_inputs(graph: Graph, rows: Iterable[Tensor], linears: Iterable[str]) -> dict[str, float]:
    """The largest magnitude that each of these linears reads, over rows of tokens [B, T]."""
    twin = graph.copy()
    if twin.dtype == torch.float16:
        twin.to(torch.float32)  # what fp16 makes infinite has a size
    watcher = _Watcher(twin, frozenset(linears))
    for ids in rows:
        watcher.run_with({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return watcher.largest


class _Watcher(Streaming):
    def __init__(self, graph: Graph, linears: frozenset[str]):
        super().__init__(graph)
        self.linears = linears
        self.largest: dict[str, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        name = node_name(n)
        if name in self.linears and isinstance(n.args[0], fx.Node):
            found = float(self.env[n.args[0]].abs().amax())
            self.largest[name] = max(found, self.largest.get(name, 0.0))
        return super().run_node(n)
