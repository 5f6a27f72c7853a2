"""What passes that insert cross-attention have in common: the options of its blocks, and what is wrong with them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import fx

from graph import Graph, QcError, raise_all
from graph.gca import Form, GcaGate, has_memory, heads_of
from passes.base import Exact, Pass


@dataclass(frozen=True, kw_only=True)
class CrossAttention(Pass):
    """Insert gated cross-attention; where, its subclasses say."""

    contract = Exact()
    idempotent = False
    after = ("quantize-base",)

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
        for key in ("heads", "kv_heads", "head_dim", "width"):
            value = getattr(self, key)
            if value is not None and value < 1:
                yield QcError(f"{key} is {value}", fix="give a number from 1")
        for key in ("attention_dropout", "output_dropout"):
            if not 0 <= getattr(self, key) < 1:
                yield QcError(f"{key} is {getattr(self, key):g}", fix="give a share from 0 to below 1; 0.1 is usual")
        if not math.isfinite(self.gate.init):
            yield QcError(f"gate.init is {self.gate.init}", fix="give a number; -1 is usual with sigmoid")

    def _no_decoder(self, graph: Graph) -> QcError | None:
        """Why nothing can be inserted into ``graph``."""
        if has_memory(graph):
            return QcError("the graph reads a memory already", fix="take one of the two insert-gca out")
        if "input_ids" not in graph.inputs or not graph.blocks:
            fix = "insert it into a language model, with on: in a recipe of several models"
            return QcError("the graph is no decoder of tokens", fix=fix)
        return None

    def _unfit(self, graph: Graph, block: int, x: fx.Node) -> Iterator[QcError]:
        """What keeps a block of it from standing behind ``x``, in ``block``."""
        if self.heads is None and heads_of(graph, block) is None:
            yield QcError(f"the heads of block {block} cannot be seen", fix="give heads")
            return
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

    def _memory_width(self, x: fx.Node) -> int:
        return self.width or int(x.meta["val"].shape[-1])


def freeze_rest(graph: Graph) -> None:
    """Freeze what no pass has put into a group."""
    for name, info in graph.tensors().items():
        if info.trainable and info.group is None:
            graph.set_info(name, trainable=False)


def new_values(graph: Graph, known: set[str]) -> int:
    """How many values there are in tensors beside those ``known``."""
    return sum(math.prod(graph.shape(name)) for name in graph.tensors() if name not in known)
