"""Moving factors between neighbours without changing what a graph computes.

A factor of what feeds a column of a weight cancels with its inverse in that column. Powers of two cancel to the bit, so
only those are moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from graph.core import Graph
from graph.ops import op_name
from graph.sites import Site

Kind = Literal["norm-linear", "v-o", "up-down"]
KINDS: tuple[Kind, ...] = ("norm-linear", "v-o", "up-down")


@dataclass(frozen=True)
class Pair:
    """What feeds some columns, and the linears that read them."""

    kind: Kind
    source: Site
    readers: tuple[Site, ...]
    group: int = 0
    """Between v and o: columns of a head. Query heads of one group read the same head of v."""


def pairs(graph: Graph, kinds: Sequence[Kind]) -> list[Pair]:
    """Every pair of the given kinds whose linears are stored as floats, in the order of the graph."""
    found = []
    for site in graph.sites("qc.rms_norm", "aten.layer_norm") if "norm-linear" in kinds else ():
        readers = tuple(Site(graph, user) for user in site.node.users)
        if (
            readers
            and _norm_weight(site)
            and all(_dense(reader) and reader.input(0) is site.node for reader in readers)
        ):
            found.append(Pair("norm-linear", site, readers))
    for block in range(graph.blocks):
        roles = {site.role: site for site in graph.sites("aten.linear") if site.block == block and _dense(site)}
        if "v-o" in kinds and {"attn.v", "attn.o"} <= roles.keys():
            cores = [site for site in graph.sites("qc.attention") if site.block == block]
            if len(cores) == 1:
                head = int(cores[0].input(2).meta["val"].shape[-1])
                found.append(Pair("v-o", roles["attn.v"], (roles["attn.o"],), head))
        if "up-down" in kinds and {"mlp.gate", "mlp.up", "mlp.down"} <= roles.keys():
            found.append(Pair("up-down", roles["mlp.up"], (roles["mlp.down"],)))
    return found


def _dense(site: Site) -> bool:
    """Whether a linear has a stored float weight that nothing else reads: not one that is tied to the embedding."""
    weight = site.weight() if site.op == "aten.linear" else None
    nodes = [n for n in site.graph.module.graph.nodes if n.op == "get_attr" and n.target == weight]
    return weight is not None and sum(len(node.users) for node in nodes) == 1


def _norm_weight(site: Site) -> str | None:
    at = 1 if site.op == "qc.rms_norm" else 2
    arg = site.node.args[at] if len(site.node.args) > at else None
    return str(arg.target) if isinstance(arg, fx.Node) and arg.op == "get_attr" else None


def balance(graph: Graph, pair: Pair, strength: float) -> int:
    """Move powers of two from what feeds the columns into them, or back, until both are about as large.

    The factor of a column is ``(largest source value / largest column value) ** strength``, rounded to a power of two;
    it divides the source and multiplies the column. Returns how many columns have a factor other than 1.
    """
    weights = [str(reader.weight()) for reader in pair.readers]
    if graph.tensor(weights[0]).is_meta:
        return 0
    large = torch.stack([graph.tensor(name).detach().float().abs().amax(0) for name in weights]).amax(0)
    name = _norm_weight(pair.source) if pair.kind == "norm-linear" else pair.source.weight()
    assert name is not None
    source = graph.tensor(name).detach()
    size = source.float().abs() if pair.kind == "norm-linear" else source.float().abs().amax(1)
    if pair.kind == "norm-linear" and _unit_offset(pair.source):
        size = (1 + source.float()).abs()
    heads = large.numel() // size.numel() if pair.group else 1
    if pair.group:
        large = large.view(-1, heads, pair.group).amax(1).view(-1)
    factor = _power_of_two(size, large, strength)
    _divide(graph, pair, name, source, factor)
    if pair.group:
        factor = factor.view(-1, 1, pair.group).expand(-1, heads, -1).reshape(-1)
    for weight in weights:
        value = graph.tensor(weight).detach()
        graph.set_tensor(weight, (value.float() * factor).to(value.dtype))
    return int((factor != 1).sum())


def _power_of_two(size: Tensor, large: Tensor, strength: float) -> Tensor:
    """Where one side is all zero the factor is 1."""
    fit = (size > 0) & (large > 0)
    ratio = torch.where(fit, size, 1.0) / torch.where(fit, large, 1.0)
    ratio = ratio / ratio[fit].log().mean().exp() if bool(fit.any()) else ratio
    return torch.where(fit, torch.exp2(torch.round(strength * torch.log2(ratio))), 1.0)


def _unit_offset(site: Site) -> bool:
    return site.op == "qc.rms_norm" and len(site.node.args) > 3 and bool(site.node.args[3])


def _divide(graph: Graph, pair: Pair, name: str, source: Tensor, factor: Tensor) -> None:
    """Divide what feeds the columns; biases go along."""
    value = source.float()
    if pair.kind != "norm-linear":
        value = value / factor[:, None]
    else:
        value = (1 + value) / factor - 1 if _unit_offset(pair.source) else value / factor
    graph.set_tensor(name, value.to(source.dtype))
    args = pair.source.node.args
    at = 2 if op_name(pair.source.node.target) == "aten.linear" else 3
    bias = args[at] if len(args) > at and pair.source.op != "qc.rms_norm" else None
    if isinstance(bias, fx.Node):
        held = graph.tensor(str(bias.target)).detach()
        graph.set_tensor(str(bias.target), (held.float() / factor).to(held.dtype))
