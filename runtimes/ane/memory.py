"""Gated cross-attention: a chunk is given the keys and values of its memory, worked out before.

They are inputs, as ``hoist-memory-kv`` makes them inputs of the graph: (1, KV, M, D) each for a memory of M tokens, and
one mask (1, 1, 1, M) for all. Without a memory the host gives zeros: values of zero add nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from graph import Graph, QcError
from graph.gca import MASK, has_memory
from graph.ops import op_name
from graph.prepared import is_hoisted
from graph.prepared import part as parted
from graph.probe import evaluate_constant
from runtimes.ane.attention import grouped, ungrouped
from runtimes.ane.emitter import half
from runtimes.ane.lowering import Lowering, Value, lowers

OPS = ("qc.memory_attention", "qc.add_gated")


def decoder_of(graph: Graph) -> Graph:
    """The graph, or of one that reads a memory the decoder that is always given its keys and values."""
    if not has_memory(graph) and not is_hoisted(graph):
        return graph
    if not is_hoisted(graph):
        what = "the decoder works the keys and values of its memory out itself"
        raise QcError(what, fix="run hoist-memory-kv before the export")
    return parted(graph)[1]


def memories_of(nodes: Iterable[fx.Node]) -> dict[fx.Node, str]:
    """The values that memory brings to these ops -> the input that holds each."""
    found: dict[fx.Node, str] = {}
    for node in nodes:
        if op_name(node.target) == "qc.memory_attention":
            _, keys, values, seen = (arg for arg in node.args[:4] if isinstance(arg, fx.Node))
            found |= {keys: str(keys.target), values: str(values.target), seen: MASK}
    return found


def memory_shapes(nodes: Iterable[fx.Node], tokens: int) -> dict[str, tuple[int, int, int, int]]:
    """The inputs of these ops that memory fills, by their names and in their order."""
    found: dict[str, tuple[int, int, int, int]] = {}
    for node, name in memories_of(nodes).items():
        value = node.meta["val"]
        found[name] = (1, 1, 1, tokens) if name == MASK else (1, value.shape[1], tokens, value.shape[3])
    return found


def any_memory(graph: Graph, tokens: int) -> dict[str, Tensor]:
    """Normal numbers for the inputs of a memory, for what is to be seen while the graph runs; none without one."""
    generator = torch.Generator().manual_seed(0)
    shapes = memory_shapes((site.node for site in graph.sites("qc.memory_attention")), tokens)
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items() if name != MASK}
    return made | ({MASK: torch.ones(1, tokens, dtype=torch.long)} if made else {})


@lowers("qc.memory_attention")
def memory_attention(low: Lowering, node: fx.Node) -> Value:
    """softmax(q k + mask) v over the tokens of the memory."""
    q, keys, values, seen = _inputs(low, node)
    heads, size = q.features
    rows = low.emit.op("mul", x=grouped(low, q, int(keys.shape[1])), y=half(size**-0.5))
    scores = low.emit.op("matmul", x=rows, y=keys, transpose_y=True)
    weights = low.emit.op("softmax", x=low.emit.op("add", x=scores, y=seen), axis=-1)
    return ungrouped(low, low.emit.op("matmul", x=weights, y=values), heads, int(values.shape[3]))


def _inputs(low: Lowering, node: fx.Node) -> tuple[Value, Any, Any, Any]:
    names: Mapping[fx.Node, str] = low.options.memories
    keys, values, seen = (low.emit.input(names[arg]) for arg in node.args[1:4] if isinstance(arg, fx.Node))
    return low.value(node.args[0]), keys, values, seen


@lowers("qc.add_gated")
def add_gated(low: Lowering, node: fx.Node) -> Value:
    """``x + f(gate) update``; the gate is a number."""
    x, update, gate, _, function = (*node.args, "sigmoid")[:5]
    assert isinstance(gate, fx.Node)
    number = evaluate_constant(low.graph, gate).detach().float()
    opened = float(number.tanh() if function == "tanh" else number.sigmoid())
    stream, added = low.value(x), low.value(update)
    scaled = low.emit.op("mul", x=low.channels(added), y=half(opened))
    return Value(low.emit.op("add", x=low.channels(stream), y=scaled), stream.features)
