"""Lowering: the ops of one part of a graph, one after the other, through the table op -> function.

A value lies with its features first and its tokens last, as the Neural Engine wants it: [B, T, C] of the graph is
(1, C, 1, S), heads [B, T, H, D] are (1, H, D, S), and [B, H, T, D] is the same memory. So where the graph only moves
the tokens between features, nothing is emitted; a reshape is, when an op next wants the other shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import fx

from graph import Graph, QcError
from graph.ops import op_name
from graph.shapes import dims_of
from graph.sites import node_name
from runtimes.ane.emitter import Array, Emitter, Var
from runtimes.ane.weights import Weight, constant
from runtimes.emitters import Emitters


@dataclass(frozen=True)
class Value:
    """A value of the graph: ``var`` holds its ``features`` in their order, then its tokens."""

    var: Var
    features: tuple[int, ...]


@dataclass(frozen=True)
class Scores(Value):
    """What an encoder's queries make of its keys, or the weights this becomes: (1, H, S, S), in natural order."""


@dataclass(frozen=True)
class Split:
    """Values that are pieces of one: the results of a chunk, or the logits of a vocabulary in several pieces."""

    values: tuple[Value, ...]


Result = Value | Split


class Cache(Protocol):
    """Where keys and values of the tokens before are."""

    def update(self, keys: Var, values: Var) -> tuple[Var, Var]:
        """Of the next attention, new rows (1, H, S, D) each  ->  all keys and values (1, H, T, D)."""
        ...


@dataclass
class Options:
    """What the whole part has in common."""

    rows_per_head: int = 16384
    """Logits that one convolution computes."""

    dense: bool = False
    """Whether low-rank scaled weights are multiplied out, which a function of many tokens computes faster."""

    gains: Mapping[fx.Node, float] = field(default_factory=dict)
    """Norm -> what its result is multiplied by beside its weight: the scale of the attention it feeds."""

    scaled: frozenset[fx.Node] = frozenset()
    """Attentions whose queries come scaled, by a gain."""

    masks: Mapping[fx.Node, str] = field(default_factory=dict)
    """Mask -> the input that holds it."""

    biases: Mapping[fx.Node, Array] = field(default_factory=dict)
    """Mask -> what is added to it, [1, heads or 1, S, S]: windows and position biases of an encoder."""

    ropes: Mapping[fx.Node, str] = field(default_factory=dict)
    """Table of a rotation -> the input that holds it."""

    memories: Mapping[fx.Node, str] = field(default_factory=dict)
    """Keys, values and mask of a memory -> the input that holds them."""

    weights: Mapping[fx.Node, Weight] = field(default_factory=dict)
    """Linear or embedding -> its weight."""

    loaded: dict[tuple[str, str], Any] = field(default_factory=dict)
    """Values of weights by name and form: the functions of a package share them."""


@dataclass
class Lowering:
    """One function of a part."""

    graph: Graph
    emit: Emitter
    tokens: int
    options: Options
    cache: Cache | None = None
    results: dict[fx.Node, Result] = field(default_factory=dict)
    shared: dict[str, Var] = field(default_factory=dict)
    """What all blocks compute with, by name."""

    def run(self, nodes: list[fx.Node]) -> None:
        """Lower these ops in their order."""
        for node in nodes:
            if node not in self.results:
                self.emit.at(node_name(node))
                self.results[node] = TABLE[op_name(node.target)](self, node)

    def value(self, node: Any) -> Value:
        """The one value of a node."""
        found = self.results[node]
        assert isinstance(found, Value), f"{node_name(node)} is in pieces"
        return found

    def shaped(self, value: Value, shape: tuple[int, ...]) -> Var:
        """The value's memory under another shape."""
        if tuple(value.var.shape) == shape:
            return value.var
        assert math.prod(value.var.shape) == math.prod(shape), f"{value.var.shape} as {shape}"
        return self.emit.op("reshape", x=value.var, shape=shape)

    def channels(self, value: Value) -> Var:
        """(1, C, 1, S)."""
        return self.shaped(value, (1, math.prod(value.features), 1, self.tokens))

    def heads(self, value: Value) -> Var:
        """(1, H, D, S)."""
        *outer, inner = value.features
        return self.shaped(value, (1, math.prod(outer), inner, self.tokens))

    def natural(self, value: Value) -> tuple[Var, int]:
        """In the shape of its features, and the axis of the last of them: (1, C, 1, S) and 1, (1, H, D, S) and 2."""
        if isinstance(value, Scores):
            return value.var, 1
        return (self.channels(value), 1) if len(value.features) == 1 else (self.heads(value), 2)

    def constant_operand(self, node: fx.Node, features: tuple[int, ...]) -> Array:
        """A stored tensor, shaped so that it can be added to a value of so many features."""
        found = constant(self.graph, node)
        kept = tuple(found.shape)
        while kept and kept[0] == 1 and len(kept) > len(features):
            kept = kept[1:]
        if len(kept) > len(features) or not all(k in (1, f) for k, f in zip(kept[::-1], features[::-1], strict=False)):
            what = f"{node_name(node)} of shape {list(found.shape)} differs from token to token"
            raise QcError(what, site=node_name(node), fix="this model cannot be exported to ane as it is")
        wide = (1,) * (len(features) - len(kept)) + kept
        return found.reshape(1, wide[0], 1, 1) if len(features) == 1 else found.reshape(1, *wide[-2:], 1)


Lower = Callable[[Lowering, fx.Node], Result]

TABLE: Emitters[Lower] = Emitters()
"""Op of the graph -> the function that emits it."""

lowers = TABLE.lowers


def features_of(node: fx.Node) -> tuple[int, ...]:
    """The sizes of a value that do not depend on batch and length."""
    return tuple(int(size) for size in dims_of(node) if size.isdigit())
