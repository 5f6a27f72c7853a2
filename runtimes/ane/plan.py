"""Which ops of a graph go into which package, and everything that stands in the way: from shapes, before any work.

A decoder becomes embeddings | chunks of blocks | head, an encoder one part or several. A part takes one value, and
gives one; parts are cut where but one value crosses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import fx

from graph import Graph, QcError
from graph.cache import has_cache, obstacles
from graph.ops import op_name
from graph.sites import is_constant, node_name, tag
from runtimes.ane import attention, layout, linear, norms, pointwise  # noqa: F401  they fill the table
from runtimes.ane.cache import MODES, Mode
from runtimes.ane.host import FIX, over_pairs, positional, takes_tokens
from runtimes.ane.lowering import TABLE
from runtimes.ane.profile import Profile
from runtimes.ane.weights import Weight, weight_of

Role = Literal["embed", "chunk", "head", "encoder"]

WEIGHTED = {"aten.linear": 1, "aten.embedding": 0}
"""Op with a weight -> which argument that is."""

MERGE = {"qc.lora": "run merge-lora before the export"}


@dataclass(frozen=True)
class Settings:
    """What is asked of an export."""

    profile: Profile
    context: int = 512
    prefill: int | None = 64
    kv: Mode = "state_slice"
    chunks: int | None = None
    lengths: tuple[int, ...] = (128,)
    """Lengths of an encoder's functions."""

    dense_prefill: bool = False


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


@dataclass
class Plan:
    """A graph, taken apart."""

    graph: Graph
    settings: Settings
    parts: list[Part]
    weights: dict[fx.Node, Weight]
    ropes: dict[fx.Node, str]
    masks: dict[fx.Node, str]
    gains: dict[fx.Node, float]
    scaled: frozenset[fx.Node]

    @property
    def decoder(self) -> bool:
        """Whether the graph has a past."""
        return self.graph.kind == "causal-lm"

    def weight_bytes(self, part: Part) -> int:
        """What the weights of a part come to, each counted once."""
        found = {self.weights[n].name: self.weights[n].bytes() for n in part.nodes if n in self.weights}
        return sum(found.values())


def plan(graph: Graph, settings: Settings) -> tuple[Plan | None, list[QcError]]:
    """Take a graph apart; or all that stands in the way."""
    errors = [*_of_settings(graph, settings), *_of_kind(graph)]
    if errors:
        return None, errors
    nodes = _computed(graph)
    errors = _missing(graph, nodes)
    weights, more = _weights(graph, nodes)
    errors += more
    if graph.kind == "causal-lm":
        why = "this model cannot run token by token, which a decoder on the Neural Engine does"
        errors += [QcError(e.what, site=e.site, fix=why) for e in obstacles(graph)]
    if errors:
        return None, errors
    gains, scaled = _gains(nodes)
    found = Plan(graph, settings, [], weights, _ropes(nodes), _masks(nodes, graph.kind == "causal-lm"), gains, scaled)
    try:
        found.parts = _parts(found, nodes)
    except QcError as error:
        return None, [error]
    errors = [*_of_parts(found), *_unplaced(found)]
    return (None if errors else found), errors


# -- what stands in the way -------------------------------------------------------------------------------------------


def _of_kind(graph: Graph) -> list[QcError]:
    if graph.kind not in ("causal-lm", "encoder"):
        return [QcError("only decoders and encoders of tokens can be exported to ane", fix="export another model")]
    if has_cache(graph):
        return [QcError("the graph has a cache already", fix="export the graph as it is before insert-kv-cache")]
    return []


def _of_settings(graph: Graph, settings: Settings) -> list[QcError]:
    found = []
    longest = graph.config.get("max_position_embeddings") or graph.config.get("n_positions")
    asked = settings.context if graph.kind == "causal-lm" else max(settings.lengths)
    name = "context" if graph.kind == "causal-lm" else "length"
    if isinstance(longest, int) and asked > longest:
        what = f"{name} {asked} is more than the {longest} positions of the model"
        found.append(QcError(what, fix=f"set {name} to at most {longest}"))
    if settings.kv not in MODES:
        found.append(QcError(f"no kv mode is called {settings.kv!r}", fix=f"use {', '.join(MODES)}"))
    if graph.kind == "causal-lm" and settings.prefill is not None and not 1 < settings.prefill <= settings.context:
        what = f"prefill {settings.prefill} does not go with context {settings.context}"
        found.append(QcError(what, fix=f"set prefill to 2 … {settings.context}, or to 0 for none"))
    if settings.kv != "io" and graph.kind == "causal-lm" and settings.context % 32:
        what = f"context {settings.context} is no multiple of 32, which the last axes of a state must be"
        found.append(QcError(what, fix=f"set context to {-(-settings.context // 32) * 32}, or kv to io"))
    return found


def _missing(graph: Graph, nodes: list[fx.Node]) -> list[QcError]:
    """All ops without a lowering, in one error."""
    missing = [node for node in nodes if op_name(node.target) not in TABLE]
    if not missing:
        return []
    counts = Counter(op_name(node.target) for node in missing)
    said = ", ".join(f"{op} (x{count})" for op, count in sorted(counts.items()))
    hints = [MERGE[op] for op in counts if op in MERGE]
    fix = "; ".join(hints) or "add one in runtimes/ane, or rewrite the op away with an earlier pass"
    return [QcError(f"ane has no lowering for {said}", site=node_name(missing[0]), fix=fix)]


def _weights(graph: Graph, nodes: list[fx.Node]) -> tuple[dict[fx.Node, Weight], list[QcError]]:
    found: dict[fx.Node, Weight] = {}
    errors: list[QcError] = []
    for node in nodes:
        op = op_name(node.target)
        source = node if op == "qc.linear_lut_factored" else node.args[WEIGHTED[op]] if op in WEIGHTED else None
        if not isinstance(source, fx.Node):
            continue
        try:
            found[node] = weight_of(graph, source, node_name(node))
        except QcError as error:
            errors.append(error)
    return found, errors


def _of_parts(found: Plan) -> list[QcError]:
    """Parts that are too large for the target."""
    errors = []
    limit = found.settings.profile.part_bytes
    for part in found.parts:
        size = found.weight_bytes(part)
        if size > limit:
            takes = f"{found.settings.profile.name} takes {limit / 1e9:.2f}"
            what = f"{_named(part)} has {size / 1e9:.2f} GB of weights, and {takes}"
            errors.append(QcError(what, fix="set chunks to more, or hold the weights in fewer bits"))
        shapes = {tuple(n.args[1].meta["val"].shape[1::2]) for n in part.attentions()}  # type: ignore[union-attr]
        if found.decoder and len(shapes) > 1:
            what = f"the attentions of {_named(part)} differ in heads or sizes: {sorted(shapes)}"
            errors.append(QcError(what, fix="set chunks so that blocks of one kind are together"))
    return errors


def _unplaced(found: Plan) -> list[QcError]:
    """Values of positions that are needed where no host gives them."""
    errors = []
    known = {*found.ropes, *found.masks}
    for part in found.parts:
        inside = set(part.nodes)
        for node in part.nodes:
            outside = [n for n in _values(node) if n not in inside and n is not part.entry and not is_constant(n)]
            for n in outside:
                if n in known or part.role in ("embed", "encoder") or takes_tokens(n):
                    continue
                what = f"{node_name(node)} needs {node_name(n)}, which depends on positions"
                errors.append(QcError(what, site=node_name(node), fix=FIX))
    return errors


def _named(part: Part) -> str:
    blocks = f" of blocks {part.blocks[0]} … {part.blocks[-1]}" if part.blocks else ""
    return f"the part {part.role}{blocks}"


# -- taking it apart --------------------------------------------------------------------------------------------------


def _computed(graph: Graph) -> list[fx.Node]:
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


def _values(node: fx.Node) -> list[fx.Node]:
    """The tensors an op reads."""
    return [n for n in node.all_input_nodes if _is_tensor(n)]


def _ropes(nodes: list[fx.Node]) -> dict[fx.Node, str]:
    """Each rotation's tables and the inputs they become: cos and sin, cos_2 and sin_2."""
    found: dict[fx.Node, str] = {}
    for node in nodes:
        if op_name(node.target) == "qc.rope":
            for table, name in zip(node.args[1:3], ("cos", "sin"), strict=True):
                assert isinstance(table, fx.Node)
                count = sum(known.startswith(name) for known in found.values())
                found.setdefault(table, name if not count else f"{name}_{count + 1}")
    return found


def _masks(nodes: list[fx.Node], decoder: bool) -> dict[fx.Node, str]:
    """Each mask and the input it becomes: mask and mask_2; of an encoder all are the one of padding."""
    found: dict[fx.Node, str] = {}
    for node in nodes:
        for mask in _masks_of(node):
            found.setdefault(mask, "mask" if not found or not decoder else f"mask_{len(found) + 1}")
    return found


def _masks_of(node: fx.Node) -> list[fx.Node]:
    """The masks that an op reads: an attention's, or what is added to scores that are spelled out."""
    if op_name(node.target) == "qc.attention":
        return [arg for arg in node.args[3:4] if isinstance(arg, fx.Node)]
    if op_name(node.target) != "aten.add.Tensor" or not over_pairs(node):
        return []
    return [arg for arg in node.all_input_nodes if not _from_tokens(arg)]


def _from_tokens(node: fx.Node) -> bool:
    """Whether a value depends on which tokens there are."""
    if op_name(node.target) == "aten.embedding" if node.op == "call_function" else False:
        return isinstance(node.args[1], fx.Node) and takes_tokens(node.args[1])
    return any(_from_tokens(n) for n in node.all_input_nodes)


def _gains(nodes: list[fx.Node]) -> tuple[dict[fx.Node, float], frozenset[fx.Node]]:
    """Norms whose gain can hold the scale of the attention behind them, and these attentions."""
    gains: dict[fx.Node, float] = {}
    scaled = set()
    for node in nodes:
        if op_name(node.target) != "qc.attention":
            continue
        at: Any = node.args[0]
        while len(at.users) == 1 and op_name(at.target) in ("qc.rope", "aten.transpose.int", "aten.view"):
            at = at.args[0]
        if op_name(at.target) == "qc.rms_norm" and len(at.users) == 1 and at.args[1] is not None:
            size = int(node.args[0].meta["val"].shape[3])  # type: ignore[union-attr]
            scale = node.args[4] if len(node.args) > 4 else None
            gains[at] = size**-0.5 if scale is None else float(str(scale))
            scaled.add(node)
    return gains, frozenset(scaled)


def _parts(found: Plan, nodes: list[fx.Node]) -> list[Part]:
    """Embeddings, chunks and head; of an encoder all together, unless that is too large."""
    blocks = _by_block(nodes, found.graph.blocks)
    groups: list[tuple[Role, list[int], list[fx.Node]]]
    before, *inner, after = blocks
    chunks = _chunks(found, blocks)
    joined: list[tuple[Role, list[int], list[fx.Node]]] = [
        ("chunk", [i for i in chunk], [n for i in chunk for n in inner[i]]) for chunk in chunks
    ]
    if found.decoder:
        groups = [("embed", [], before), *joined, ("head", [], after)]
    else:
        joined[0] = ("encoder", joined[0][1], before + joined[0][2])
        joined[-1] = (joined[-1][0], joined[-1][1], joined[-1][2] + after)
        groups = joined
    parts: list[Part] = []
    for role, numbers, members in groups:
        entry = parts[-1].exit if parts else None
        parts.append(Part(role, members, entry, _exit(found.graph, nodes, members), numbers))
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


def _chunks(found: Plan, blocks: list[list[fx.Node]]) -> list[list[int]]:
    """The blocks of each chunk: as few chunks as the target allows, or as many as asked, of about the same bytes."""
    sizes = [sum(found.weights[n].bytes() for n in block if n in found.weights) for block in blocks[1:-1]]
    asked, limit = found.settings.chunks, found.settings.profile.part_bytes
    if asked is not None and not 1 <= asked <= len(sizes):
        raise QcError(f"chunks is {asked}, and the model has {len(sizes)} blocks", fix=f"set it to 1 … {len(sizes)}")
    extra = 0 if found.decoder else sum(found.weights[n].bytes() for n in blocks[0] + blocks[-1] if n in found.weights)
    wanted = asked or max(1, -(-(sum(sizes) + extra) // limit))
    total, chunks, gone = sum(sizes) or 1, [[0]], sizes[0]
    for i in range(1, len(sizes)):
        left_blocks, left_chunks = len(sizes) - i, wanted - len(chunks)
        full = gone + sizes[i] / 2 > total * len(chunks) / wanted
        if left_chunks and (full or left_blocks == left_chunks):
            chunks.append([])
        chunks[-1].append(i)
        gone += sizes[i]
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
        if op_name(node.target) in ("qc.attention", "qc.rope"):
            continue
        for n in _values(node):
            known = n in inside or n is part.entry or takes_tokens(n) or over_pairs(n)
            if not known and positional(n):
                found[n] = None
    return list(found)
