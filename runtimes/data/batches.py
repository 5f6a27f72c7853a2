"""Rows of tokens, and batches of them. Which rows a batch has follows from the seed and its number alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtimes.data.tokens import Tokens

IGNORED = -100
"""The label of a position that nothing is learned at."""


@dataclass(frozen=True)
class Batch:
    """Some rows, ready for a graph."""

    input_ids: Tensor
    """int64 [rows, length]"""

    attention_mask: Tensor
    """int64 [rows, length]: 0 is padding, 1, 2, … the number of the document in its row."""

    labels: Tensor
    """int64 [rows, length]: the token to predict *at* each position, that is the next one, or ``IGNORED``."""

    memory_ids: Tensor | None = None
    """int64 [rows, chunks, tokens]: what each row may look up, in the encoder's tokens; None for a plain batch."""

    memory_mask: Tensor | None = None
    """int64 [rows, chunks, tokens]: 1 is a token, 0 is padding; a row with fewer chunks has some of padding alone."""

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        moved = {name: value.to(device, non_blocking=True) for name, value in self.tensors().items()}
        return replace(self, **moved)

    def tensors(self) -> dict[str, Tensor]:
        """What it holds, by name; memory only where there is some."""
        found = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def without_memory(self) -> Self:
        """The same, with nothing to look up."""
        return replace(self, memory_ids=None, memory_mask=None)

    def with_memory_of_the_next_row(self) -> Self:
        """The same, each row with what belongs to the row after it: no row keeps its own, if there are two."""
        if self.memory_ids is None or self.memory_mask is None:
            return self
        return replace(self, memory_ids=self.memory_ids.roll(-1, 0), memory_mask=self.memory_mask.roll(-1, 0))


@dataclass(frozen=True)
class Layout:
    """Which pieces of the token file make which row."""

    begins: NDArray[np.int64]
    """[pieces], first token of each piece."""

    ends: NDArray[np.int64]
    """[pieces], behind the last token of each piece."""

    first: NDArray[np.int64]
    """[rows + 1], first piece of each row."""

    dropped: int = 0
    """Documents of which nothing is left to learn, their answers lying beyond the row's end."""


class Rows:
    """The rows of a split, in an order that the seed and the epoch decide.

    Plain text is packed without gaps and cut where a row ends. An answer is never torn from its prompt: whole
    documents are packed into rows, and cut at the end only if one alone is longer than a row.
    """

    def __init__(self, tokens: Tokens, *, length: int, packing: bool, seed: int, padding: int):
        self.tokens, self.length, self.packing, self.seed, self.padding = tokens, length, packing, seed, padding
        self.layout = _lay_out(tokens, length, packing, seed)
        self._order = lru_cache(maxsize=2)(self._order_of)

    def __len__(self) -> int:
        """Rows in one epoch."""
        return len(self.layout.first) - 1

    def shuffled(self, first: int, count: int) -> Batch:
        """``count`` rows of the endless sequence of shuffled epochs, from number ``first`` on."""
        numbers = (divmod(n, len(self)) for n in range(first, first + count))
        return self.batch([int(self._order(epoch)[at]) for epoch, at in numbers])

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows of these numbers; without packing, no longer than the longest of them, rounded up to 8."""
        layout = self.layout
        pieces = [range(int(layout.first[r]), int(layout.first[r + 1])) for r in rows]
        used = max((sum(int(layout.ends[p] - layout.begins[p]) for p in row) for row in pieces), default=1)
        width = self.length if self.packing else min(-(-used // 8) * 8, self.length)
        ids = np.full((len(rows), width), self.padding, np.int64)
        mask = np.zeros((len(rows), width), np.int64)
        labels = np.full((len(rows), width), IGNORED, np.int64)
        for r, row in enumerate(pieces):
            at = 0
            for number, p in enumerate(row, 1):
                begin, end = int(layout.begins[p]), int(layout.ends[p])
                stop = at + end - begin
                ids[r, at:stop] = self.tokens.ids[begin:end]
                mask[r, at:stop] = number
                labels[r, at : stop - 1] = ids[r, at + 1 : stop]
                if self.tokens.trained is not None:
                    labels[r, at : stop - 1][~self.tokens.trained[begin + 1 : end]] = IGNORED
                at = stop
        return Batch(torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(labels))

    @property
    def key(self) -> str:
        """The sha256 of what the rows were made from."""
        return self.tokens.key

    def _order_of(self, epoch: int) -> NDArray[np.int64]:
        return order_of_epoch(self.seed, epoch, len(self))


def order_of_epoch(seed: int, epoch: int, rows: int) -> NDArray[np.int64]:
    """The order in which an epoch reads ``rows`` rows."""
    return _random(seed, epoch + 1).permutation(rows)


def _random(seed: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream], np.uint64)))


def _lay_out(tokens: Tokens, length: int, packing: bool, seed: int) -> Layout:
    begins, ends = np.asarray(tokens.starts[:-1]), np.asarray(tokens.starts[1:])
    order = _random(seed, 0).permutation(len(begins))
    begins, ends = begins[order], ends[order]
    if tokens.trained is None:
        return _stream(begins, ends, length) if packing else _split(begins, ends, length)
    ends = np.minimum(ends, begins + length)
    learned = np.concatenate([[0], np.cumsum(tokens.trained, dtype=np.int64)])
    useful = learned[ends] > learned[np.minimum(begins + 1, ends)]
    dropped = int((~useful).sum())
    begins, ends = begins[useful], ends[useful]
    if not packing:
        return Layout(begins, ends, np.arange(len(begins) + 1), dropped)
    return Layout(begins, ends, _next_fit(ends - begins, length), dropped)


def _stream(begins: NDArray[np.int64], ends: NDArray[np.int64], length: int) -> Layout:
    """All documents in one row without end, cut every ``length`` tokens."""
    edges = np.concatenate([[0], np.cumsum(ends - begins)])
    total = int(edges[-1])
    cuts = np.unique(np.concatenate([edges, np.arange(0, total, length)]))
    document = np.searchsorted(edges, cuts[:-1], side="right") - 1
    shift = begins[document] - edges[document]
    first = np.searchsorted(cuts[:-1], np.append(np.arange(0, total, length), total))
    return Layout(cuts[:-1] + shift, cuts[1:] + shift, first)


def _split(begins: NDArray[np.int64], ends: NDArray[np.int64], length: int) -> Layout:
    """Each document in rows of its own, as many as it needs."""
    needed = -(-(ends - begins) // length)
    document = np.repeat(np.arange(len(begins)), needed)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(needed) - needed, needed)
    first = begins[document] + nth * length
    return Layout(first, np.minimum(first + length, ends[document]), np.arange(len(document) + 1))


def _next_fit(sizes: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Fill rows in order: a piece that does not fit opens the next row."""
    edges = np.concatenate([[0], np.cumsum(sizes)])
    first = [0]
    while first[-1] < len(sizes):
        first.append(int(np.searchsorted(edges, edges[first[-1]] + length, side="right")) - 1)
    return np.asarray(first, np.int64)
