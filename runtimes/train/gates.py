"""How far the gates of cross-attention are open, step by step.

gate_avg     what the updates are multiplied by, on average over the gates
gate_moved   the largest distance of a gate from where it began
gate/N       that of the N-th gate
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from graph import Graph
from runtimes.train.distribute import whole


class Gates:
    """The gates of a graph: none, where it has no cross-attention."""

    def __init__(self, graph: Graph, parameters: Mapping[str, Tensor]):
        self.parameters = parameters
        self.functions: dict[str, str] = {}
        for site in graph.sites("qc.add_gated"):
            gate, function = site.node.args[2], (*site.node.args, "sigmoid")[4]
            if isinstance(gate, fx.Node) and str(gate.target) in parameters:
                self.functions[str(gate.target)] = str(function)
        self.start = {name: self._opened(name, graph.tensor(name)) for name in self.functions}

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the figures."""
        each = (f"gate/{number}" for number in range(len(self.functions)))
        return ("gate_avg", "gate_moved", *each) if self.functions else ()

    def figures(self) -> dict[str, float]:
        """All of them as they are now."""
        opened = {name: self._opened(name, whole(self.parameters[name])) for name in self.functions}
        if not opened:
            return {}
        moved = max(abs(value - self.start[name]) for name, value in opened.items())
        each = {f"gate/{number}": value for number, value in enumerate(opened.values())}
        return {"gate_avg": sum(opened.values()) / len(opened), "gate_moved": moved} | each

    def _opened(self, name: str, value: Tensor) -> float:
        return float((torch.tanh if self.functions[name] == "tanh" else torch.sigmoid)(value.detach().float()))
