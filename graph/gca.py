"""Gated cross-attention in a decoder: where it goes, what it is made of, and finding it again.

    before    x = add(h, mlp)
              n = qc.rms_norm(x, …)
    after     x = add(h, mlp)
              x.norm = qc.rms_norm(x, gca.norm.weight, eps)
              y = qc.add_gated(x, linear(qc.memory_attention(q, k, v, seen), gca.o_proj.weight), gca.gate, seen)
              n = qc.rms_norm(y, …)

``graph/memory.py`` has the ops, and says which inputs bring the memory.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, fx

from graph.core import Graph, TensorInfo
from graph.lora_sets import training_input
from graph.ops import op_name
from graph.sites import Site, set_tag, tag

MEMORY, VALUE, MASK = "memory", "memory_value", "memory_mask"
"""The inputs of a decoder that reads a memory."""

GROUP = "gca"
"""The group that trains all of it."""


@dataclass(frozen=True, kw_only=True)
class GcaGate:
    """What an update is multiplied by before it is added."""

    function: Literal["sigmoid", "tanh"] = "sigmoid"
    """Of one number, in fp32; under tanh it may become negative, and begins closed at 0."""

    init: float = -1.0
    """Where that number begins. Sigmoid at -1 lets 0.27 through; at 0, tanh gives nothing but itself a gradient."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """What one block of it is."""

    heads: int
    kv_heads: int
    head_dim: int
    width: int
    """Of a memory token."""

    eps: float
    gate: GcaGate
    attention_dropout: float
    output_dropout: float
    dtype: torch.dtype | None
    """In which projections are kept, whatever the graph runs in; None for its own."""

    seed: int


def places(graph: Graph, point: Literal["block_out", "after_attn"]) -> dict[int, fx.Node]:
    """Where it can go: block -> the residual stream behind it, or behind its attention."""
    if point == "block_out":
        return {s.block: s.node for s in graph.sites() if s.role == "block_out" and s.block is not None}
    found = {}
    for site in graph.sites("aten.linear"):
        if site.role == "attn.o" and site.block is not None and (node := _sum_behind(site.node, site.block)):
            found[site.block] = node
    return found


def _sum_behind(linear: fx.Node, block: int) -> fx.Node | None:
    """The sum of what ``linear`` gives and of what came into the block."""
    pending, seen = [linear], set()
    while pending:
        node = pending.pop(0)
        for user in node.users:
            if user in seen or user.op != "call_function" or tag(user, "block") != block:
                continue
            seen.add(user)
            others = [arg for arg in user.all_input_nodes if arg is not node]
            if op_name(user.target) == "aten.add.Tensor":
                came_in = len(others) == 1 and tag(others[0], "block") != block
                return user if came_in else None
            if len(others) == 0 or op_name(user.target).startswith("qc."):
                pending.append(user)
    return None


def heads_of(graph: Graph, block: int) -> tuple[int, int] | None:
    """The heads and key/value heads of a block's own attention."""
    for site in graph.sites("qc.attention"):
        if site.block == block:
            return int(site.input(0).meta["val"].shape[1]), int(site.input(1).meta["val"].shape[1])
    return None


def has_memory(graph: Graph) -> bool:
    """Whether the graph reads a memory."""
    return MEMORY in graph.inputs


def add_memory_inputs(graph: Graph, width: int, separate: bool) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Give the graph the inputs of a memory; its tokens, its values, and which of them there are."""
    first = next(n for n in graph.module.graph.nodes if n.op not in ("placeholder", "get_attr"))
    empty = torch.empty(0, dtype=graph.dtype)
    memory = graph.add_input(MEMORY, empty, dims=("B", "M", width))
    value = graph.add_input(VALUE, empty, dims=("B", "M", width)) if separate else None
    mask = graph.add_input(MASK, torch.empty(0, dtype=torch.long), dims=("B", "M"))
    ids = next(n for n in graph.module.graph.nodes if n.op == "placeholder")

    batch = insert_of_memory(graph, "aten.sym_size.int", ids, 0, name="batch", before=first)
    about = (width, graph.dtype, graph.device)
    tokens = insert_of_memory(graph, "qc.memory_tokens", memory, batch, *about, name="tokens", before=first)
    set_tag(tokens, model_dtype=True)
    values = tokens
    if value is not None:
        values = insert_of_memory(graph, "qc.memory_values", value, tokens, name="values", before=first)
    return tokens, values, insert_of_memory(graph, "qc.memory_seen", mask, tokens, name="seen", before=first)


def insert_of_memory(graph: Graph, op: str, *args: Any, name: str, before: fx.Node) -> fx.Node:
    """Insert an op on the memory, which belongs to no block."""
    node = graph.insert(op, *args, name=f"memory/{name}", before=before, role="gca.memory")
    node.meta["custom"] = {k: v for k, v in node.meta["custom"].items() if k in ("site", "role")}
    return node


Memory = tuple[fx.Node, fx.Node, fx.Node]
"""Its tokens, its values, and which of them are seen."""


class Inserted(NamedTuple):
    """The ops of one block that others go by."""

    attention: fx.Node
    added: fx.Node


def insert_block(
    graph: Graph, x: fx.Node, memory: Memory, form: Form, stage: str = "", prior: fx.Node | None = None
) -> Inserted:
    """Put one block of it behind ``x``; everything that read ``x`` reads its result.

    ``stage`` goes into the names, where a block of the model has more than one; ``prior`` weighs tokens beforehand.
    """
    build = _Builder(graph, x, form, stage)
    tokens, values, seen = memory
    width, inner = int(x.meta["val"].shape[-1]), form.heads * form.head_dim
    kv = form.kv_heads * form.head_dim
    readers = list(x.users)
    norm = build.vector("norm.weight", width, 1.0)
    normed = build("norm", "qc.rms_norm", x, norm, form.eps, False, True, role="norm")
    q = build.heads("q", build.linear("q", normed, inner, width), form.heads)
    k = build.heads("k", build.linear("k", tokens, kv, form.width), form.kv_heads)
    v = build.heads("v", build.linear("v", values, kv, form.width), form.kv_heads)
    drop = (form.attention_dropout, training_input(graph)) if form.attention_dropout else ()
    known = {} if prior is None else {"prior": prior}
    core = build("attention", "qc.memory_attention", q, k, v, seen, *drop, role="core", **known)
    flat = build("attention.flat", "aten.flatten.using_ints", core, 2, 3)
    update = build.linear("o", flat, width, inner)
    if form.output_dropout:
        update = build("dropout", "qc.dropout", update, form.output_dropout, training_input(graph))
    gate = build.vector("gate", 1, form.gate.init)
    added = build("add", "qc.add_gated", x, update, gate, seen, form.gate.function, role="out")
    for reader in readers:
        reader.replace_input_with(x, added)
    return Inserted(core, added)


class _Builder:
    """Inserts the ops of one block behind ``x``, in order."""

    def __init__(self, graph: Graph, x: fx.Node, form: Form, stage: str):
        self.graph, self.x, self.form, self.before = graph, x, form, x.next
        self.tags = {key: tag(x, key) for key in ("block", "stack", "path")}
        path = self.tags["path"] or str(tag(x, "site", x.name)).replace("/", ".")
        self.path = f"{path}.gca.{stage}".rstrip(".")
        block = {key: self.tags[key] for key in ("block", "stack")}
        self.info = TensorInfo(trainable=True, group=GROUP, pinned=True, **block)
        self.plan = is_plan(graph)

    def __call__(self, name: str, op: str, *args: Any, role: str = "shape", **kwargs: Any) -> fx.Node:
        site = f"{self.path}.{name}"
        node = self.graph.insert(op, *args, name=site, before=self.before, role=f"gca.{role}", **kwargs)
        set_tag(node, **self.tags)
        return node

    def linear(self, letter: str, x: fx.Node, out: int, inputs: int) -> fx.Node:
        """A projection without bias, uniform within ``1 / sqrt(in)`` as torch begins its linears."""
        form, name = self.form, f"{self.path}.{letter}_proj.weight"
        info = replace(self.info, role=f"gca.{letter}", pinned=form.dtype is not None)
        value = self.uniform(name, out, inputs).to(form.dtype or self.graph.dtype)
        weight = self.graph.add_tensor(name, value, before=self.before, info=info)
        if form.dtype is not None:
            weight = self(f"{letter}_proj/cast", "aten.to.dtype", weight, self.graph.dtype, role=letter)
            set_tag(weight, model_dtype=True)
        return self(f"{letter}_proj", "aten.linear", x, weight, role=letter)

    def heads(self, letter: str, x: fx.Node, count: int) -> fx.Node:
        """Heads apart and before the tokens: [B, T, heads * d]  ->  [B, heads, T, d]."""
        apart = self(f"{letter}_proj/heads", "aten.unflatten.int", x, -1, [count, self.form.head_dim])
        return self(f"{letter}_proj/transposed", "aten.transpose.int", apart, 1, 2)

    def vector(self, name: str, size: int, fill: float) -> fx.Node:
        """An fp32 tensor that stays fp32."""
        value = torch.full((size,), fill, dtype=torch.float32, device="meta" if self.plan else self.graph.device)
        info = replace(self.info, role="gca.gate" if name == "gate" else "gca.norm")
        return self.graph.add_tensor(f"{self.path}.{name}", value, before=self.before, info=info)

    def uniform(self, name: str, out: int, inputs: int) -> Tensor:
        """[out, in], of numbers that depend on the seed and the name alone; no numbers in a plan."""
        if self.plan:
            return torch.empty(out, inputs, device="meta")
        digest = hashlib.sha256(f"{self.form.seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        bound = 1 / math.sqrt(inputs)
        return torch.empty(out, inputs).uniform_(-bound, bound, generator=generator).to(self.graph.device)


def is_plan(graph: Graph) -> bool:
    """Whether the graph was made of a configuration, and has no weights."""
    loaded = (name for name, info in graph.tensors().items() if info.saved and name not in graph.stored)
    return any(graph.tensor(name).is_meta for name in loaded)


def blocks_of(graph: Graph) -> list[Site]:
    """The sites at which its updates are added, in order."""
    return graph.sites("qc.add_gated")
