"""The key/value cache of a chunk: one tensor of 2L rows, keys of its L attentions in rows 0 to L-1, then values.

    state_slice   a state; new rows are written at ``position``
    state_blend   a state; new rows are blended in by ``onehot``
    io            an input; new rows are an output, and the host writes them

A state is read once: what it holds later is what the update gave (a second read may be merged with the first, rule T1).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from runtimes.ane.emitter import Emitter, Var, half

Mode = Literal["state_slice", "state_blend", "io"]
MODES: tuple[Mode, ...] = ("state_slice", "state_blend", "io")
NAME = "kv_cache"


@dataclass
class ChunkCache:
    """The part that all modes share: which rows an attention has."""

    emit: Emitter
    shape: tuple[int, int, int, int]
    """(2L, heads, context, size)."""

    tokens: int
    at: int = 0
    new: dict[int, Var] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._start()

    def _start(self) -> None:
        """What is needed before the first attention."""

    def update(self, keys: Var, values: Var) -> tuple[Var, Var]:
        """New rows (1, H, S, D) of the next attention  ->  all its keys and values (1, H, T, D)."""
        rows = self.at, self.shape[0] // 2 + self.at
        self.at += 1
        all_keys, all_values = (self._update(row, new) for row, new in zip(rows, (keys, values), strict=True))
        return all_keys, all_values

    def _update(self, row: int, new: Var) -> Var:
        raise NotImplementedError

    def finish(self) -> list[tuple[str, Var]]:
        """What is left to do when all attentions are; the outputs that this adds."""
        return []

    def _row(self, of: Var, row: int) -> Var:
        _, heads, context, size = self.shape
        return self.emit.op("slice_by_index", x=of, begin=[row, 0, 0, 0], end=[row + 1, heads, context, size])

    def _stacked(self) -> Var:
        return self.emit.op("concat", values=[self.new[row] for row in range(self.shape[0])], axis=0)


class SliceCache(ChunkCache):
    """``state_slice``: every row is written where it belongs, then read back."""

    def _start(self) -> None:
        self.emit.at(NAME)
        self.state = self.emit.input(NAME)
        self.position = self.emit.input("position")
        self.end = self.emit.op("add", x=self.position, y=np.int32(self.tokens))

    def _update(self, row: int, new: Var) -> Var:
        op, zero = self.emit.op, np.zeros(1, np.int32)
        begin = op("concat", values=[np.array([row, 0], np.int32), self.position, zero], axis=0)
        end = op("concat", values=[np.array([row + 1, 0], np.int32), self.end, zero], axis=0)
        whole = [False, True, False, True]
        written = op("slice_update", x=self.state, update=new, begin=begin, end=end, begin_mask=whole, end_mask=whole)
        self.state = self.emit.update_state(NAME, written)
        return self._row(self.state, row)


class BlendCache(ChunkCache):
    """``state_blend``: ``row * (1 - onehot) + onehot new``, and the state is written once."""

    def _start(self) -> None:
        self.emit.at(NAME)
        self.state = self.emit.input(NAME)
        self.onehot = self.emit.input("onehot")
        taken = self.onehot
        if self.tokens > 1:
            taken = self.emit.op("reduce_sum", x=taken, axes=[3], keep_dims=True)
        self.kept = self.emit.op("sub", x=half(1), y=taken)

    def _update(self, row: int, new: Var) -> Var:
        kept = self.emit.op("mul", x=self._row(self.state, row), y=self.kept)
        kind = "matmul" if self.tokens > 1 else "mul"  # of one token both are the same
        self.new[row] = self.emit.op("add", x=kept, y=self.emit.op(kind, x=self.onehot, y=new))
        return self.new[row]

    def finish(self) -> list[tuple[str, Var]]:
        self.emit.at(NAME)
        self.emit.update_state(NAME, self._stacked())
        return []


class IoCache(ChunkCache):
    """``io``: the past and the block are joined for attention, and the block's rows are an output."""

    def _start(self) -> None:
        self.past = self.emit.input(NAME)

    def _update(self, row: int, new: Var) -> Var:
        self.new[row] = new
        return self.emit.op("concat", values=[self._row(self.past, row), new], axis=2)

    def finish(self) -> list[tuple[str, Var]]:
        self.emit.at(NAME)
        return [("kv_new", self._stacked())]


CACHES: dict[str, type[ChunkCache]] = {"state_slice": SliceCache, "state_blend": BlendCache, "io": IoCache}
