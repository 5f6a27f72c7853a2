"""Reading prompts, and then one token at a time: with a cache, or without."""

from __future__ import annotations

import torch
from torch import Tensor

from graph import Graph
from graph.cache import Cache

CHUNK = 512
"""Tokens of a prompt that are read at once: it bounds the logits held, [B, CHUNK, V]."""


class Cached:
    """Reads the prompts once, padded on the left so that all rows end together, and then one token at a time."""

    def __init__(self, graph: Graph, prompts: list[list[int]], slots: int, padding: int):
        longest = max(map(len, prompts))
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
        return self.cache.run(ids, mask, first)[:, -1]


class Recomputed:
    """Reads everything again for each token, padded on the right so that positions are those of single prompts."""

    def __init__(self, graph: Graph, prompts: list[list[int]], padding: int):
        self.graph, self.rows, self.padding = graph, [list(p) for p in prompts], padding

    def start(self) -> Tensor:
        """The logits [B, V] behind the prompts."""
        longest, device = max(map(len, self.rows)), self.graph.device
        ids = torch.tensor([r + [self.padding] * (longest - len(r)) for r in self.rows], device=device)
        mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in self.rows], device=device)
        logits: Tensor = self.graph(input_ids=ids, attention_mask=mask)
        ends = torch.tensor([len(r) - 1 for r in self.rows], device=device)
        return logits[torch.arange(len(self.rows), device=device), ends]

    def next(self, tokens: Tensor) -> Tensor:
        """The logits [B, V] behind one more token [B]."""
        for row, token in zip(self.rows, tokens.tolist(), strict=True):
            row.append(token)
        return self.start()
