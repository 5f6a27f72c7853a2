"""Let a decoder look things up in a memory: gated cross-attention behind some of its blocks.

    before    x = add(h, mlp)
    after     x = add(h, mlp)
              x.gca.norm = qc.rms_norm(x, gca.norm.weight, 1e-06, False, True)
              x.gca.attention = qc.memory_attention(q of the norm, k and v of the memory, memory/seen)
              x.gca.add = qc.add_gated(x, linear(x.gca.attention, gca.o_proj.weight), gca.gate, memory/seen, sigmoid)

The memory comes in through new inputs, ``memory`` [B, M, width] and ``memory_mask`` [B, M], or from an encoder that
``attach-memory`` links. Without one, or with a gate at zero, the graph computes what it did, to the bit, and so does
every row of a batch whose mask is zero. What is inserted trains as the group ``gca``; the rest is frozen but for what
another pass put into a group. Gates and norms stay in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import fx

from graph import Graph, QcError, raise_all
from graph.gca import Form, GcaGate, add_memory_inputs, has_memory, heads_of, insert_block, places
from graph.sites import node_name
from passes.base import Exact, Pass, Report


@dataclass(frozen=True, kw_only=True)
class InsertGca(Pass):
    """Insert gated cross-attention to a memory behind every n-th block."""

    contract = Exact()
    idempotent = False
    after = ("quantize-base",)

    every_n: int = 3
    """Behind every so many blocks, from ``start`` on."""

    start: int | None = None
    """The first block; without it the block a third of the way up."""

    layers: tuple[int, ...] | None = None
    """Behind these blocks and no others; in the place of ``every_n`` and ``start``."""

    point: Literal["block_out", "after_attn"] = "block_out"
    """Behind the whole block, or between its attention and its MLP."""

    heads: int | None = None
    """Query heads; without it, those of the block's own attention."""

    kv_heads: int | None = None
    """Heads of keys and values; without it, those of the block's own attention, or ``heads`` where that is given."""

    head_dim: int | None = None
    """Size of a head; without it, the width of the model divided by ``heads``."""

    width: int | None = None
    """Width of a memory token; without it, that of the model."""

    separate_values: bool = False
    """Read values from a second memory, ``memory_value``, as insert-kv-projection gives one."""

    gate: GcaGate = field(default_factory=GcaGate)
    """``{function: sigmoid, init: -1.0}``"""

    attention_dropout: float = 0.0
    """Share of the attention weights that are zeroed in training."""

    output_dropout: float = 0.0
    """Share of what is added that is zeroed in training."""

    eps: float | None = None
    """Of the norm; without it, that of the model's configuration, or 1e-6."""

    dtype: Literal["fp32", "model"] = "fp32"
    """Dtype in which projections are kept: fp32 whatever the graph runs in, or the graph's."""

    seed: int = 0
    """Seed of the projections."""

    def __post_init__(self) -> None:
        raise_all(list(self._mistakes()))

    def _mistakes(self) -> Iterator[QcError]:
        if self.layers is not None and (self.every_n, self.start) != (3, None):
            yield QcError("layers stands beside every_n or start", fix="keep layers, or the other two")
        for key in ("every_n", "heads", "kv_heads", "head_dim", "width"):
            value = getattr(self, key)
            if value is not None and value < 1:
                yield QcError(f"{key} is {value}", fix="give a number from 1")
        for key in ("attention_dropout", "output_dropout"):
            if not 0 <= getattr(self, key) < 1:
                yield QcError(f"{key} is {getattr(self, key):g}", fix="give a share from 0 to below 1; 0.1 is usual")
        if not math.isfinite(self.gate.init):
            yield QcError(f"gate.init is {self.gate.init}", fix="give a number; -1 is usual with sigmoid")

    def blocks(self, count: int) -> list[int]:
        """The blocks behind which it goes in a model of ``count`` blocks."""
        if self.layers is not None:
            return sorted(set(self.layers))
        return list(range(count // 3 if self.start is None else self.start, count, self.every_n))

    def check(self, graph: Graph) -> Sequence[QcError]:
        """Blocks that there are not, heads that do not divide, a graph that is no decoder or has a memory already."""
        if has_memory(graph):
            return [QcError("the graph reads a memory already", fix="take one of the two insert-gca out")]
        if "input_ids" not in graph.inputs or not graph.blocks:
            fix = "insert it into a language model, with on: in a recipe of several models"
            return [QcError("the graph is no decoder of tokens", fix=fix)]
        chosen = self.blocks(graph.blocks)
        if not chosen:
            return [QcError(f"start {self.start} leaves none of {graph.blocks} blocks", fix="lower start")]
        wrong = [block for block in chosen if not 0 <= block < graph.blocks]
        if wrong:
            what = f"there is no block {wrong[0]} to put it behind"
            return [QcError(what, fix=f"the blocks are 0 to {graph.blocks - 1}")]
        return [error for block in chosen for error in self._unfit(graph, block)]

    def _unfit(self, graph: Graph, block: int) -> Iterator[QcError]:
        x = places(graph, self.point).get(block)
        if x is None:
            fix = "set point to block_out" if self.point == "after_attn" else "leave this block out of layers"
            yield QcError(f"block {block} has no residual sum at its {self.point}", fix=fix)
        elif self.heads is None and heads_of(graph, block) is None:
            yield QcError(f"the heads of block {block} cannot be seen", fix="give heads")
        else:
            heads, kv_heads = self._heads(graph, block)
            width = int(x.meta["val"].shape[-1])
            if heads % kv_heads:
                yield QcError(f"{heads} heads cannot share {kv_heads} key/value heads", fix="give heads and kv_heads")
            if self.head_dim is None and width % heads:
                yield QcError(f"a width of {width} does not divide into {heads} heads", fix="give head_dim")

    def _heads(self, graph: Graph, block: int) -> tuple[int, int]:
        own = heads_of(graph, block)
        if self.heads is not None:
            return self.heads, self.kv_heads or self.heads
        assert own is not None
        return own[0], self.kv_heads or own[1]

    def run(self, graph: Graph) -> Report:
        """Insert it, from the first block to the last, and freeze what is not trained on purpose."""
        raise_all(list(self.check(graph)))
        for name, info in graph.tensors().items():
            if info.trainable and info.group is None:
                graph.set_info(name, trainable=False)
        found, chosen = places(graph, self.point), self.blocks(graph.blocks)
        model_width = int(found[chosen[0]].meta["val"].shape[-1])
        memory = add_memory_inputs(graph, self.width or model_width, self.separate_values)
        known = set(graph.tensors())
        for block in chosen:
            insert_block(graph, found[block], memory, self._form(graph, block, found[block]))
        new = [name for name in graph.tensors() if name not in known]
        values = sum(math.prod(graph.shape(name)) for name in new)
        figures: dict[str, float | int | str] = {"layers": ", ".join(map(str, chosen)), "trainable_values": values}
        return Report(tuple(node_name(found[block]) for block in chosen), figures)

    def _form(self, graph: Graph, block: int, x: fx.Node) -> Form:
        heads, kv_heads = self._heads(graph, block)
        width = int(x.meta["val"].shape[-1])
        return Form(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=self.head_dim or width // heads,
            width=self.width or width,
            eps=self.eps if self.eps is not None else float(graph.config.get("rms_norm_eps", 1e-6)),
            gate=self.gate,
            attention_dropout=self.attention_dropout,
            output_dropout=self.output_dropout,
            dtype=torch.float32 if self.dtype == "fp32" else None,
            seed=self.seed,
        )
