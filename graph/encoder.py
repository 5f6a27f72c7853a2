"""A model as the encoder of a memory: it returns the states of all its tokens, and looks one way or both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from torch import fx

from graph.core import Graph
from graph.errors import QcError

Attention = Literal["causal", "bidirectional"]


def as_encoder(graph: Graph) -> Graph:
    """Make a language model return what its head reads, in place; an encoder stays as it is."""
    if graph.kind != "causal-lm":
        return graph
    heads = [site for site in graph.sites("aten.linear") if site.role == "head"]
    if len(heads) != 1:
        fix = "use a model with a plain head, or one that is an encoder"
        raise QcError("the last hidden states of this language model cannot be seen", fix=fix)
    head = heads[0]
    graph.set_outputs([head.input(0)])
    graph.kind = "encoder"
    graph.module.graph.eliminate_dead_code()
    read = {str(n.target) for n in graph.module.graph.nodes if n.op == "get_attr"}
    for name in [name for name, info in graph.tensors().items() if name not in read and info.role == "head"]:
        graph.remove_tensor(name)
    graph.verify()
    return graph


def has_encoder_alone(config: Any) -> bool:
    """Whether the architecture is of encoder and decoder, and transformers has its encoder by itself, as of T5."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES as ALONE

    return str(ALONE.get(config.model_type, "")).endswith("EncoderModel")


def set_attention(graph: Graph, attention: Attention) -> Graph:
    """Let tokens see those behind them too, or not, in place: in the masks, and in what goes without one."""
    masks, cores = graph.sites("qc.attention_mask"), graph.sites("qc.attention")
    if not masks or not cores:
        raise QcError("the attention of this model is not one op", fix="leave attention: out")
    for site in masks:
        site.node.args = (site.node.args[0], attention, *site.node.args[2:])
    for site in cores:
        _set_causal(site.node, attention == "causal")
    graph.verify()
    return graph


def _set_causal(core: fx.Node, causal: bool) -> None:
    q, k, v, mask, scale, _, *rest = (*core.args, *(None,) * 6)[: max(6, len(core.args))]
    core.args = (q, k, v, mask, scale, causal, *rest)


def longest_text(graph: Graph) -> int | None:
    """The tokens of the longest text that an encoder, or that of a joint graph, has positions for.

    None where positions are computed, and not looked up in a table.
    """
    return min(_tables_of_positions(graph), default=None)


def _tables_of_positions(graph: Graph) -> Iterator[int]:
    joint = graph.config.get("joint")
    config = graph.config if joint is None else joint["encoder"]
    named = config.get("max_position_embeddings")
    for site in graph.sites("aten.embedding"):
        rows, padding = int(site.input(0).meta["val"].shape[0]), site.node.args[2:3]
        if rows == named and (joint is None or site.stack == 0):
            before = int(padding[0]) + 1 if padding and isinstance(padding[0], int) else 0
            yield rows - max(before, 0)  # some number positions from the one behind padding
