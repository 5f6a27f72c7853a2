"""Keys and values of a memory that are worked out once, before a decoder runs.

Inputs that the rewrite adds, all of which may be left out (then they are computed from ``memory``):

memory_key_i, memory_value_i   [B, kv_heads, M, d]   of the i-th attention to the memory

Beside them ``memory_mask`` [B, M] has to be given, which says what of them is padding.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from graph.core import Graph
from graph.gca import MASK, MEMORY, VALUE
from graph.probe import evaluate
from graph.sites import Site, set_tag, tag

NUMBERED = ("qc.memory_seen", "qc.memory_documents")
"""The ops that read the mask: which tokens there are, and of which documents."""


def is_hoisted(graph: Graph) -> bool:
    """Whether the graph takes keys and values that were worked out before."""
    return bool(_prepared(graph))


def _prepared(graph: Graph) -> list[Site]:
    """The sites that take keys and values, in order."""
    return [site for site in graph.sites("qc.prepared") if site.role == "gca.prepared"]


def hoist(graph: Graph) -> list[str]:
    """Let every attention to the memory take prepared keys and values; return the sites that read otherwise now."""
    attentions = graph.sites("qc.memory_attention")
    for i, site in enumerate(attentions):
        for at, what in ((1, "key"), (2, "value")):
            _prepare(graph, site, at, what, i)
    changed = [site.name for site in attentions] + ([] if MASK in graph.inputs else _take_mask(graph))
    graph.verify()
    return changed


def _prepare(graph: Graph, site: Site, at: int, what: str, number: int) -> None:
    computed = site.input(at)
    value = computed.meta["val"]
    dims = ("B", value.shape[1], "M", value.shape[3])
    given = graph.add_input(f"memory_{what}_{number}", torch.empty(0, dtype=value.dtype), dims=dims)
    label = f"{site.name}.{what}"
    node = graph.insert("qc.prepared", computed, given, name=label, before=site.node, role="gca.prepared")
    computed.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)


def _take_mask(graph: Graph) -> list[str]:
    """Let a joint graph, which makes its mask, take the one that belongs to prepared keys; return what reads it."""
    given = graph.add_input(MASK, torch.empty(0, dtype=torch.long), dims=("B", "M"))
    seen = graph.sites(*NUMBERED)
    for site in seen:
        made = site.input(0)
        node = graph.insert("qc.prepared", made, given, name=f"{site.name}/mask", before=site.node, role="gca.memory")
        site.set_input(0, node)
    return [site.name for site in seen]


def prepare(graph: Graph, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The keys and values of a memory, as inputs of the hoisted ``graph``.

    given: memory, memory_mask and what else of the memory the graph reads, or memory_ids and memory_attention of a
    joint one. What comes back holds the mask, ``memory_mask``, too.
    """
    sites = _prepared(graph)
    assert sites, "the graph is hoisted first"
    rows = next(iter(given.values())).shape[0]
    inputs = {str(n.target): n.args[0] for n in graph.module.graph.nodes if n.op == "placeholder" and n.args}
    inputs |= {"input_ids": torch.zeros(rows, 1, dtype=torch.long, device=graph.device), **given}
    seen = max(graph.sites(*NUMBERED), key=lambda site: NUMBERED.index(site.op)).node  # documents tell more
    *found, mask = evaluate(graph, [*(s.input(0) for s in sites), seen], inputs)
    named = {str(s.input(1).target): value for s, value in zip(sites, found, strict=True)}
    return named | {MASK: mask.long()}


def part(graph: Graph) -> tuple[Graph, Graph]:
    """Part a hoisted decoder in two: what makes keys and values of a memory, and a decoder that is always given them.

    The first takes ``memory`` (and ``memory_value``), or the chunks of a joint graph, and returns keys and values in
    the order of the inputs of the second, which has no encoder and no projections of the memory any more. Both share
    the tensors of ``graph``, which stays.
    """
    maker, decoder = graph.copy(), graph.copy()
    maker.kind, maker.blocks = "module", 0
    maker.set_outputs([site.input(0) for site in _prepared(maker)])
    _always_given(maker, (MEMORY, VALUE), "qc.memory_tokens")
    for site in decoder.sites("qc.prepared"):
        given = site.input(1)
        given.args = ()
        site.node.replace_all_uses_with(given)
    for site in decoder.sites(*NUMBERED):
        mask = site.input(0)
        mask.args = ()
        dtype = torch.bool if site.op == NUMBERED[0] else torch.long
        name = f"{site.name}/{'bool' if dtype == torch.bool else 'long'}"
        seen = decoder.insert("aten.to.dtype", mask, dtype, name=name, before=site.node, role="gca.memory")
        site.node.replace_all_uses_with(seen)
    return _swept(maker), _swept(decoder)


def _always_given(graph: Graph, inputs: tuple[str, ...], op: str) -> None:
    """Make optional inputs required, and the op that stood for their absence a cast."""
    for node in graph.module.graph.nodes:
        if node.op == "placeholder" and node.target in inputs:
            node.args = ()
    for site in graph.sites(op):
        memory, dtype = site.input(0), site.node.args[3]
        cast = graph.insert("aten.to.dtype", memory, dtype, name=f"{site.name}/cast", before=site.node)
        set_tag(cast, model_dtype=bool(tag(site.node, "model_dtype", False)))
        site.node.replace_all_uses_with(cast)


def _swept(graph: Graph) -> Graph:
    """Without the ops, inputs and tensors that nothing reads any more."""
    nodes: fx.Graph = graph.module.graph
    nodes.eliminate_dead_code()
    for node in [n for n in nodes.nodes if n.op == "placeholder" and not n.users]:
        nodes.erase_node(node)
    read = {str(n.target) for n in nodes.nodes if n.op == "get_attr"}
    for name in [name for name in graph.tensors() if name not in read]:
        graph.remove_tensor(name)
    graph.verify()
    return graph
