"""Which ops of a graph go into which package, and everything that stands in the way: from shapes, before any work.

A decoder becomes embeddings | chunks of blocks | head, an encoder one part or several. A part takes one value, and
gives one; parts are cut where but one value crosses.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import fx

from graph import Graph, QcError
from graph.cache import has_cache, obstacles
from graph.ops import op_name
from graph.sites import is_constant, node_name
from runtimes.ane import attention, layout, linear, memory, norms, pointwise  # noqa: F401  they fill the table
from runtimes.ane.cache import MODES, Mode
from runtimes.ane.host import FIX, over_pairs, takes_tokens
from runtimes.ane.lowering import TABLE
from runtimes.ane.memory import decoder_of, memories_of
from runtimes.ane.parts import Part, computed_nodes, parts_of, values_of
from runtimes.ane.profile import Profile
from runtimes.ane.weights import Weight, weight_of

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
    memory: int = 64
    """Tokens of the memory that a decoder with gated cross-attention reads."""


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
    memories: dict[fx.Node, str]

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
    unfit = _of_kind(graph)
    if unfit:
        return None, unfit
    try:
        graph = decoder_of(graph)
    except QcError as error:
        return None, [error]
    nodes = computed_nodes(graph)
    errors = [*_of_settings(graph, settings), *_missing(graph, nodes)]
    weights, more = _weights(graph, nodes)
    errors += more
    if graph.kind == "causal-lm":
        why = "this model cannot run token by token, which a decoder on the Neural Engine does"
        errors += [QcError(e.what, site=e.site, fix=why) for e in obstacles(graph)]
    if errors:
        return None, errors
    gains, scaled = _gains(nodes)
    masks = _masks(nodes, graph.kind == "causal-lm")
    found = Plan(graph, settings, [], weights, _ropes(nodes), masks, gains, scaled, memories_of(nodes))
    try:
        sizes = {node: weight.bytes() for node, weight in weights.items()}
        found.parts = parts_of(graph, nodes, sizes, settings.chunks, settings.profile.part_bytes)
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
    known = {*found.ropes, *found.masks, *found.memories}
    for part in found.parts:
        inside = set(part.nodes)
        for node in part.nodes:
            outside = [n for n in values_of(node) if n not in inside and n is not part.entry and not is_constant(n)]
            for n in outside:
                if n in known or part.role in ("embed", "encoder") or takes_tokens(n):
                    continue
                what = f"{node_name(node)} needs {node_name(n)}, which depends on positions"
                errors.append(QcError(what, site=node_name(node), fix=FIX))
    return errors


def _named(part: Part) -> str:
    blocks = f" of blocks {part.blocks[0]} … {part.blocks[-1]}" if part.blocks else ""
    return f"the part {part.role}{blocks}"


# -- what the host gives ----------------------------------------------------------------------------------------------


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
    computed = set(nodes)
    for node in nodes:
        for mask in _masks_of(node, computed):
            found.setdefault(mask, "mask" if not found or not decoder else f"mask_{len(found) + 1}")
    return found


def _masks_of(node: fx.Node, computed: set[fx.Node]) -> list[fx.Node]:
    """The masks that an op reads: an attention's, or what is added to scores that are spelled out."""
    if op_name(node.target) == "qc.attention":
        return [arg for arg in node.args[3:4] if isinstance(arg, fx.Node)]
    if op_name(node.target) != "aten.add.Tensor" or not over_pairs(node):
        return []
    return [arg for arg in node.all_input_nodes if arg not in computed]


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
