"""The layers of a model as parts of its graph: the MLP or the attention of each block, or blocks as a whole.

A layer goes from one value to another: what its first linears read, and what its last one gives, with whatever an
adapter or a rounding puts behind it. Found by roles, so the layers of a graph before and after passes are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, fx

from graph.core import Graph
from graph.errors import QcError
from graph.ops import op_name
from graph.sites import Site

Kind = Literal["mlp", "attn", "blocks"]

LAST = {"mlp": "mlp.down", "attn": "attn.o"}
BEHIND = ("qc.lora", "qc.lora_in_place", "qc.dora", "qc.ste_fp16")
"""Ops that belong to the linear before them."""


@dataclass(frozen=True)
class Layer:
    """A part of a graph."""

    name: str
    """``mlp.0``, ``attn.3``, ``block.1``."""

    x: fx.Node
    y: fx.Node

    def nodes(self) -> list[fx.Node]:
        """All that y is computed from, up to x and without it, in order; y is the last."""
        found: dict[fx.Node, None] = {}
        pending = [self.y]
        while pending:
            node = pending.pop()
            if node is not self.x and node not in found:
                found[node] = None
                pending += node.all_input_nodes
        return [node for node in self.x.graph.nodes if node in found]

    def tensors(self) -> list[str]:
        """The stored tensors that it reads."""
        return [str(node.target) for node in self.nodes() if node.op == "get_attr"]


def layers(graph: Graph, kind: Kind) -> list[Layer]:
    """The layers of a kind, one a block, in order."""
    return [_whole(graph, block) if kind == "blocks" else _part(graph, kind, block) for block in range(graph.blocks)]


def _part(graph: Graph, kind: Kind, block: int) -> Layer:
    linears = [s for s in graph.sites() if s.block == block and s.role.startswith(f"{kind}.") and _is_linear(s)]
    last = [site for site in linears if site.role == LAST[kind]]
    first = [site for site in linears if site.role != LAST[kind]]
    if len(last) != 1 or not first:
        what = f"block {block} has no {kind} whose linears end in one {LAST[kind]}"
        raise QcError(what, fix="train layer by layer with order: [blocks], or end to end")
    return Layer(f"{kind}.{block}", first[0].input(0), _end(last[0].node))


def _is_linear(site: Site) -> bool:
    """Whether it is a linear, or one that unpacks its weight by itself."""
    return site.op == "aten.linear" or site.op.startswith("qc.linear_")


def _whole(graph: Graph, block: int) -> Layer:
    outs = {site.block: site.node for site in graph.sites() if site.role == "block_out"}
    first = next((site for site in graph.sites() if site.block == block and site.role == "norm"), None)
    before = outs.get(block - 1, first.input(0) if first is not None else None)
    if block not in outs or before is None:
        what = f"where block {block} begins and ends cannot be seen in the graph"
        raise QcError(what, fix="train layer by layer with order: [mlp, attn], or end to end")
    return Layer(f"block.{block}", before, outs[block])


def _end(node: fx.Node) -> fx.Node:
    """What stands behind a linear and belongs to it."""
    while True:
        behind = [
            u for u in node.users if u.op == "call_function" and op_name(u.target) in BEHIND and u.args[0] is node
        ]
        if not behind:
            return node
        node = behind[0]


def function_of(graph: Graph, layer: Layer) -> Callable[..., Tensor]:
    """A layer by itself: a function of its x and of the inputs of the graph, over the same tensors."""
    nodes = fx.Graph()
    copied = {layer.x: nodes.placeholder("layer_x")}
    for node in graph.module.graph.nodes:
        if node.op == "placeholder" and node not in copied:
            copied[node] = nodes.node_copy(node)
    for node in layer.nodes():
        if node not in copied:
            copied[node] = nodes.node_copy(node, copied.__getitem__)
    nodes.output(copied[layer.y])
    module: Callable[..., Tensor] = fx.GraphModule(graph.module, nodes)
    return module
