"""How much memory a training takes, and what to compute again where there is less: ``train.memory``.

One row runs forward, and what autograd keeps of it is counted, op by op. Of that a step holds

    as it is          everything, for every row of the batch
    blocks again      what lies outside of blocks, the input of every block, and the inside of the largest one
    MLPs in chunks    the same, with no more of that block's MLP than some tokens

beside the weights, their gradients and what the optimizer remembers. The first that fits is taken.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from graph import Graph, QcError
from graph.layers import Layer
from graph.sites import is_constant, tag
from runtimes.settings import Train
from runtimes.train.losses import LOGITS_AT_ONCE

SPARE = 0.9
"""The share of the memory that is free that ``auto`` takes."""

FEWEST = 32
"""Tokens that a chunk of an MLP has at least: with fewer, weights are read for next to nothing."""


@dataclass(frozen=True)
class Plan:
    """What is computed again."""

    blocks: bool = False
    chunk: int | None = None
    """Tokens of an MLP at a time."""

    said: str | None = None


@dataclass
class Kept:
    """Bytes that autograd keeps of one row, by where they come from; those of weights are the same for all rows."""

    length: int
    outside: int = 0
    inside: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    mlp: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    """Of ``inside``, what lies in MLPs that can run in chunks."""

    weights: dict[int | None, int] = field(default_factory=lambda: defaultdict(int))
    """What is worked out of weights alone, by block."""

    border: int = 0
    """The input of a block."""

    def whole(self, rows: int) -> int:
        """With everything kept."""
        return rows * (self.outside + sum(self.inside.values())) + sum(self.weights.values())

    def again(self, rows: int, chunk: int | None = None) -> int:
        """With blocks computed again, and their MLPs so many tokens at a time."""
        share = 1.0 if chunk is None else min(1.0, chunk / self.length)
        largest = max((rows * self._of(block, share) + self.weights[block] for block in self.inside), default=0)
        return int(rows * (self.outside + self.border * len(self.inside)) + largest + self.weights[None])

    def _of(self, block: int, share: float) -> float:
        return self.inside[block] - (1 - share) * self.mlp[block]


class _Count(fx.Interpreter):
    """Runs a graph and counts what is kept behind each of its ops."""

    def __init__(self, graph: Graph, kept: Kept, mlps: set[fx.Node]) -> None:
        super().__init__(graph.module)
        self.kept, self.mlps, self.node = kept, mlps, next(iter(graph.module.graph.nodes))
        own = (graph.tensor(name) for name in graph.tensors())
        self.seen: dict[int, Tensor] = {one.untyped_storage().data_ptr(): one for one in own}
        self.constants: dict[int, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        result = super().run_node(n)
        if isinstance(result, Tensor) and n.op == "call_function" and is_constant(n):
            self.constants[result.untyped_storage().data_ptr()] = result  # held, for its place is known by it
        if tag(n, "role") == "block_out" and isinstance(result, Tensor):
            self.kept.border = max(self.kept.border, result.nbytes)
        return result

    def see(self, value: Tensor) -> Tensor:
        """Count a tensor that autograd keeps, once."""
        storage = value.untyped_storage()
        if storage.data_ptr() in self.seen:
            return value
        self.seen[storage.data_ptr()] = value
        block, size = tag(self.node, "block"), storage.nbytes()
        if storage.data_ptr() in self.constants:
            self.kept.weights[block] += size
        elif block is None:
            self.kept.outside += size
        else:
            self.kept.inside[block] += size
            self.kept.mlp[block] += size if self.node in self.mlps else 0
        return value


def count(graph: Graph, length: int, mlps: Sequence[Layer], precision: torch.dtype) -> Kept:
    """What autograd keeps of one row of ``length`` tokens."""
    kept = Kept(length)
    run = _Count(graph, kept, {node for layer in mlps for node in layer.nodes()})
    ids = torch.zeros(1, length, dtype=torch.int64, device=graph.device)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    nodes = [n for n in graph.module.graph.nodes if n.op == "placeholder"]
    args = [given[n.target] if n.target in given else n.args[0] for n in nodes]
    cast = torch.autocast(graph.device.type, precision) if precision != torch.float32 else nullcontext()
    with cast, torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(run.see, lambda value: value):
        run.run(*args)
    return kept


def plan(
    graph: Graph, settings: Train, trained: Sequence[str], mlps: Sequence[Layer], beside: int, dtype: torch.dtype
) -> Plan:
    """What a training of ``graph`` has to compute again; ``beside`` are the bytes of its teacher."""
    always = settings.checkpointing
    kept, rows = count(graph, settings.length, mlps, dtype), settings.batch
    fixed = _fixed(graph, settings, trained) + beside
    limit = settings.memory_bytes() or _held(graph) + int(SPARE * free(graph.device))
    for chosen, activations in _ways(kept, rows, settings.length, bool(mlps)):
        if fixed + activations <= limit and (chosen.blocks or not always):
            break
    needed, first = fixed + activations, fixed + kept.whole(rows)
    return Plan(chosen.blocks, chosen.chunk, _said(chosen, limit, first, needed))


def _ways(kept: Kept, rows: int, length: int, chunks: bool) -> Iterator[tuple[Plan, int]]:
    """From what costs no time to what costs the most, each with the bytes of its activations."""
    yield Plan(), kept.whole(rows)
    yield Plan(blocks=True), kept.again(rows)
    tokens = length // 2
    while chunks and tokens >= FEWEST:
        yield Plan(blocks=True, chunk=tokens), kept.again(rows, tokens)
        tokens //= 2


def _said(chosen: Plan, limit: int, first: int, needed: int) -> str:
    said = f"memory: a step takes about {_size(first)} of the {_size(limit)} that there are"
    if chosen.blocks:
        what = "blocks are computed again in the backward"
        what += f", and MLPs {chosen.chunk} tokens at a time" if chosen.chunk else ""
        said += f"; {what}, which takes {_size(needed)}"
    return said if needed <= limit else f"{said}. That is still too much: lower batch, and raise accumulate"


def _fixed(graph: Graph, settings: Train, trained: Sequence[str]) -> int:
    """Weights, their gradients, what the optimizer and averages remember, and the logits that are there at a time."""
    copies = 1 + (2 if settings.optimizer == "adamw" else 1) + (settings.ema is not None) + bool(settings.grokfast)
    values = sum(graph.tensor(name).numel() for name in trained)
    return _held(graph) + 4 * copies * values + 3 * 4 * LOGITS_AT_ONCE


def dense_bytes(graph: Graph) -> int:
    """What a teacher takes once its weights are read, in fp32."""
    return sum(4 * math.prod(graph.shape(name)) for name in graph.tensors())


def _held(graph: Graph) -> int:
    return sum(graph.tensor(name).nbytes for name in graph.tensors())


def free(device: torch.device) -> int:
    """The bytes that can still be had."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [_meminfo()]
    for limit, used in (("memory.max", "memory.current"),):
        try:
            folder = Path("/sys/fs/cgroup")
            found.append(int((folder / limit).read_text()) - int((folder / used).read_text()))
        except (OSError, ValueError):  # no limit is set, or this is no Linux
            continue
    return min(found)


def _meminfo() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        raise QcError(
            "memory is auto, and this system does not say how much is free", fix="give a size, such as memory: 8GiB"
        ) from None
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def _size(count: float) -> str:
    return f"{count / (1 << 30):.2f} GiB" if count >= 1 << 30 else f"{count / (1 << 20):.0f} MiB"
