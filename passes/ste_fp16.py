"""Compute linears as a device with fp16 numbers does, and let gradients through unchanged.

    before    y = linear(x, W/dequantize, b)
    after     x/fp16 = qc.ste_fp16(x)
              y = linear(x/fp16, W/dequantize, b/fp16)      W/dequantize with fp16=True
              y/fp16 = qc.ste_fp16(y)

The rounding model, the same in training and in the deployed graph: what goes into a linear, its levels, factors of
scales and bias are fp16 numbers, sums are fp32, and what comes out is rounded once. After ``snap`` the graph computes
the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from graph import Graph, QcError, Selector, Site
from graph.ops import op_name
from graph.sites import node_name
from passes.base import BLOCK_WEIGHTS, Lossy, Pass, Report

LUT = ("qc.dequantize_lut", "qc.fake_quantize_lut", "qc.dequantize_vector_lut", "qc.fake_quantize_vector_lut")


@dataclass(frozen=True, kw_only=True)
class SteFp16(Pass):
    """Round inputs, weights, biases and outputs of the selected linears to fp16."""

    contract = Lossy(min_psnr_db=35.0, min_weight_snr_db=50.0)
    ops = ("aten.linear",)

    select: Selector = BLOCK_WEIGHTS
    """Which linears."""

    def check(self, graph: Graph) -> Sequence[QcError]:
        """Linears that feed an adapter already, whose input would be another one."""
        try:
            sites = self.select.pick(graph.sites(*self.ops), graph.blocks)
        except QcError as error:
            return [error]
        fix = "move ste-fp16 before add-lora"
        return [
            QcError(f"{site.name} has an adapter already", fix=fix, site=site.name)
            for site in sites
            if any(_op(user) == "qc.lora" for user in site.node.users)
        ]

    def run(self, graph: Graph) -> Report:
        """Rewrite one linear after the other; those that read the same value read the same rounding of it."""
        changed: list[str] = []
        rounded: dict[fx.Node, fx.Node] = {}
        for site in self.select.pick(graph.sites(*self.ops), graph.blocks):
            if any(_op(user) == "qc.ste_fp16" for user in site.node.users):
                continue
            x = site.input(0)
            if x not in rounded:
                rounded[x] = graph.insert("qc.ste_fp16", x, name=f"{node_name(x)}/fp16", before=site.node)
            changed += _weight(graph, site, site.input(1))
            bias = [_round(graph, site, b, "bias") if isinstance(b, fx.Node) else b for b in site.node.args[2:]]
            site.node.args = (rounded[x], site.node.args[1], *bias)
            _behind(graph, site)
            changed.append(site.name)
        return Report(tuple(changed), {"linears": sum(not name.endswith("quantize") for name in changed)})


def _behind(graph: Graph, site: Site) -> None:
    """Let the readers of a linear read its rounded output."""
    users = list(site.node.users)
    rounded = graph.insert("qc.ste_fp16", site.node, name=f"{site.name}/fp16", before=site.node.next)
    for user in users:
        user.replace_input_with(site.node, rounded)


def _weight(graph: Graph, site: Site, weight: fx.Node) -> list[str]:
    """Let the weight be made of fp16 numbers; the name of what unpacks it, if that is another site."""
    unpacks = weight
    while _op(unpacks) == "aten.to.dtype":
        unpacks = unpacks.all_input_nodes[0]
    if _op(unpacks) not in LUT:
        site.node.args = (site.node.args[0], _round(graph, site, weight, "weight"), *site.node.args[2:])
        return []
    unpacks.kwargs = {**unpacks.kwargs, "fp16": True}
    graph.shapes.type_call(unpacks)
    return [node_name(unpacks)]


def _round(graph: Graph, site: Site, node: fx.Node, what: str) -> fx.Node:
    return graph.insert("qc.ste_fp16", node, name=f"{site.name}.{what}/fp16", before=site.node)


def _op(node: fx.Node) -> str | None:
    return op_name(node.target) if node.op == "call_function" else None
