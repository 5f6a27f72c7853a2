"""The parts of a graph: which ops go into which package. Parts are cut where but one value crosses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import fx

from graph import Graph, QcError
from graph.ops import op_name
from graph.sites import node_name, tag
from runtimes.ane.host import over_pairs, positional, takes_tokens

Role = Literal["embed", "chunk", "head", "encoder"]


@dataclass
class Part:
    """One package."""

    role: Role
    nodes: list[fx.Node]
    entry: fx.Node | None
    """The value it takes; None where it takes tokens."""

    exit: fx.Node
    blocks: list[int] = field(default_factory=list)

    def attentions(self) -> list[fx.Node]:
        """Its attentions, in order."""
        return [node for node in self.nodes if op_name(node.target) == "qc.attention"]


def parts_of(
    graph: Graph, nodes: list[fx.Node], sizes: Mapping[fx.Node, int], chunks: int | None, limit: int
) -> list[Part]:
    """Embeddings, chunks and head; of an encoder all together, unless that is too large.

    ``sizes`` are the bytes of the weights that ops read, ``limit`` those that a part may have.
    """
    decoder, blocks = graph.kind == "causal-lm", _by_block(nodes, graph.blocks)
    groups: list[tuple[Role, list[int], list[fx.Node]]]
    before, *inner, after = blocks
    grouped = _chunks(blocks, sizes, chunks, limit, decoder)
    joined: list[tuple[Role, list[int], list[fx.Node]]] = [
        ("chunk", list(chunk), [n for i in chunk for n in inner[i]]) for chunk in grouped
    ]
    if decoder:
        groups = [("embed", [], before), *joined, ("head", [], after)]
    else:
        joined[0] = ("encoder", joined[0][1], before + joined[0][2])
        joined[-1] = (joined[-1][0], joined[-1][1], joined[-1][2] + after)
        groups = joined
    parts: list[Part] = []
    for role, numbers, members in groups:
        entry = parts[-1].exit if parts else None
        parts.append(Part(role, members, entry, _exit(graph, nodes, members), numbers))
    return parts


def _by_block(nodes: list[fx.Node], count: int) -> list[list[fx.Node]]:
    """The ops before the blocks, those of each block, and those behind them."""
    assert count, "a decoder or encoder has blocks"
    found: list[list[fx.Node]] = [[] for _ in range(count + 2)]
    at = 0
    last = max(i for i, node in enumerate(nodes) if tag(node, "block") is not None)
    for i, node in enumerate(nodes):
        block = tag(node, "block")
        at = count + 1 if i > last else at if block is None else max(at, block + 1)
        found[at].append(node)
    return found


def _chunks(
    blocks: list[list[fx.Node]], sizes: Mapping[fx.Node, int], asked: int | None, limit: int, decoder: bool
) -> list[list[int]]:
    """The blocks of each chunk: as few chunks as the limit allows, or as many as asked, of about the same bytes."""
    before, *inner, after = [sum(sizes.get(n, 0) for n in block) for block in blocks]
    if asked is not None and not 1 <= asked <= len(inner):
        raise QcError(f"chunks is {asked}, and the model has {len(inner)} blocks", fix=f"set it to 1 … {len(inner)}")
    wanted = asked or max(1, -(-(sum(inner) + (0 if decoder else before + after)) // limit))
    total, chunks, gone = sum(inner) or 1, [[0]], inner[0]
    for i in range(1, len(inner)):
        left_blocks, left_chunks = len(inner) - i, wanted - len(chunks)
        full = gone + inner[i] / 2 > total * len(chunks) / wanted
        if left_chunks and (full or left_blocks == left_chunks):
            chunks.append([])
        chunks[-1].append(i)
        gone += inner[i]
    return chunks


def _exit(graph: Graph, nodes: list[fx.Node], members: list[fx.Node]) -> fx.Node:
    """The one value that later ops read of these, or before these and still."""
    order = {node: i for i, node in enumerate(nodes)}
    end = order[members[-1]]
    outputs = set(graph.output_nodes())
    crossing = [
        node for node in nodes[: end + 1] if node in outputs or any(order.get(user, -1) > end for user in node.users)
    ]
    if len(crossing) != 1:
        names = ", ".join(node_name(node) for node in crossing)
        what = f"behind {node_name(members[-1])} {len(crossing)} values go on: {names}"
        raise QcError(what, site=node_name(members[-1]), fix="set chunks to 1, or export another model")
    return crossing[0]


def names_of(nodes: Mapping[fx.Node, str], part: Part) -> dict[fx.Node, str]:
    """Of named values, those that a part reads."""
    read = {n for node in part.nodes for n in node.all_input_nodes}
    return {node: name for node, name in nodes.items() if node in read}


def positions_of(part: Part) -> list[fx.Node]:
    """The values of positions that a part computes with, masks and rotations apart."""
    inside, found = set(part.nodes), dict[fx.Node, None]()
    for node in part.nodes:
        if op_name(node.target) in ("qc.attention", "qc.rope", "qc.memory_attention", "qc.add_gated"):
            continue
        for n in values_of(node):
            known = n in inside or n is part.entry or takes_tokens(n) or over_pairs(n)
            if not known and positional(n):
                found[n] = None
    return list(found)


def computed_nodes(graph: Graph) -> list[fx.Node]:
    """The ops that depend on which tokens there are, in order: the others are of the host."""
    found: dict[fx.Node, None] = {}
    for site in graph.sites():
        node = site.node
        starts = site.op == "aten.embedding" and isinstance(node.args[1], fx.Node) and takes_tokens(node.args[1])
        if starts or (any(n in found for n in node.all_input_nodes) and _is_tensor(node)):
            found[node] = None
    needed: set[fx.Node] = set()
    pending = graph.output_nodes()
    while pending:
        node = pending.pop()
        if node in found and node not in needed:
            needed.add(node)
            pending += node.all_input_nodes
    return [node for node in found if node in needed]


def _is_tensor(node: fx.Node) -> bool:
    return not isinstance(node.meta["val"], (int, float, bool))


def values_of(node: fx.Node) -> list[fx.Node]:
    """The tensors an op reads."""
    return [n for n in node.all_input_nodes if _is_tensor(n)]
