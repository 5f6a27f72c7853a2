"""Reading prompts, and then one token at a time: with a cache, or without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from graph import Graph, QcError
from graph.cache import Cache, has_cache, insert_cache
from graph.probe import vocabulary

CHUNK = 512
"""Tokens of a prompt that are read at once: it bounds the logits held, [B, CHUNK, V]."""


class Reader(Protocol):
    """Reads some prompts, and then a token of each at a time."""

    def start(self) -> Tensor:
        """The logits [B, V] behind the prompts."""
        ...

    def next(self, tokens: Tensor) -> Tensor:
        """The logits [B, V] behind one more token [B]."""
        ...


class Model(Protocol):
    """What a ``Generator`` asks of a model: a graph made ready, or an export that runs."""

    vocabulary: int
    uncached: str | None
    """Why it reads everything again for each token; None where it has a cache."""

    @property
    def device(self) -> torch.device:
        """Where its logits are."""
        ...

    @property
    def limit(self) -> int | None:
        """The most positions it knows; None where nobody says."""
        ...

    def reader(self, prompts: list[list[int]], slots: int, padding: int) -> Reader:
        """A reader of prompts that has room for ``slots`` tokens a row."""
        ...


class Cached:
    """Reads the prompts once, padded on the left so that all rows end together, and then one token at a time."""

    def __init__(self, graph: Graph, prompts: list[list[int]], slots: int, padding: int, memory: Mapping[str, Tensor]):
        longest, self.memory = max(map(len, prompts)), memory
        self.ids = torch.tensor([[padding] * (longest - len(p)) + p for p in prompts], device=graph.device)
        self.mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=graph.device)
        self.padded = longest - torch.tensor([len(p) for p in prompts], device=graph.device)
        self.even = not bool(self.padded.any())
        self.cache = Cache(graph, len(prompts), slots)

    def start(self) -> Tensor:
        """The logits [B, V] behind the prompts."""
        logits = torch.empty(0)
        for begin in range(0, self.ids.shape[1], CHUNK):
            logits = self._run(self.ids[:, begin : begin + CHUNK], self.mask[:, begin : begin + CHUNK])
        return logits

    def next(self, tokens: Tensor) -> Tensor:
        """The logits [B, V] behind one more token [B]."""
        return self._run(tokens[:, None], torch.ones_like(tokens)[:, None])

    def _run(self, ids: Tensor, mask: Tensor) -> Tensor:
        first = None if self.even else self.cache.filled - self.padded
        return self.cache.run(ids, mask, first, **self.memory)[:, -1]


class Recomputed:
    """Reads everything again for each token, padded on the right so that positions are those of single prompts."""

    def __init__(self, graph: Graph, prompts: list[list[int]], padding: int, memory: Mapping[str, Tensor]):
        self.graph, self.rows, self.padding, self.memory = graph, [list(p) for p in prompts], padding, memory

    def start(self) -> Tensor:
        """The logits [B, V] behind the prompts."""
        longest, device = max(map(len, self.rows)), self.graph.device
        ids = torch.tensor([r + [self.padding] * (longest - len(r)) for r in self.rows], device=device)
        mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in self.rows], device=device)
        logits: Tensor = self.graph(input_ids=ids, attention_mask=mask, **self.memory)
        ends = torch.tensor([len(r) - 1 for r in self.rows], device=device)
        return logits[torch.arange(len(self.rows), device=device), ends]

    def next(self, tokens: Tensor) -> Tensor:
        """The logits [B, V] behind one more token [B]."""
        for row, token in zip(self.rows, tokens.tolist(), strict=True):
            row.append(token)
        return self.start()


class GraphModel:
    """A graph made ready to generate.

    It may have its cache already; if not, a copy of it over the same tensors gets one. A model that cannot have one
    reads everything again for each token, and ``Generated.uncached`` says so. ``memory`` are further inputs, of one
    row, that are the same for all prompts and all tokens.
    """

    def __init__(self, graph: Graph, memory: Mapping[str, Tensor] | None = None):
        self.graph, self.uncached = _cached(graph)
        self.memory = dict(memory or {})
        self.vocabulary = vocabulary(graph)
        self.limit = _limit(graph)

    @property
    def device(self) -> torch.device:
        """That of the graph."""
        return self.graph.device

    def reader(self, prompts: list[list[int]], slots: int, padding: int) -> Reader:
        """With the cache if there is one."""
        rows = {name: value.expand(len(prompts), *value.shape[1:]) for name, value in self.memory.items()}
        if self.uncached is None:
            return Cached(self.graph, prompts, slots, padding, rows)
        return Recomputed(self.graph, prompts, padding, rows)


def _cached(graph: Graph) -> tuple[Graph, str | None]:
    """The graph with a cache; or itself, and why it takes none."""
    if graph.kind == "encoder":
        raise QcError("an encoder generates no text", fix="give a causal language model")
    graph.materialize()
    if any(graph.tensor(name).is_meta for name in graph.tensors()):
        raise QcError("the graph has no weights", fix="capture a model folder, not a configuration")
    if has_cache(graph):
        return graph, None
    copy = graph.copy()
    try:
        insert_cache(copy)
    except QcError as error:
        return graph, error.what
    return copy, None


def _limit(graph: Graph) -> int | None:
    """The most positions the model knows."""
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    return next((graph.config[n] for n in names if isinstance(graph.config.get(n), int)), None)
