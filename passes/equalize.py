"""Balance the columns of weights with what feeds them.

    before    n = qc.rms_norm(x, N, …)        q = linear(n, Wq)         k = linear(n, Wk)
    after     n = qc.rms_norm(x, N / f, …)    q = linear(n, Wq * f)     k = linear(n, Wk * f)

Factors are powers of two, so outputs stay the same bits. Columns of like size quantize better with scales that rows or
groups of columns share; low-rank scales take such factors in by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from graph import Graph, QcError
from graph.equivalent import KINDS, balance, pairs
from passes.base import Close, Pass, Report


@dataclass(frozen=True, kw_only=True)
class Equalize(Pass):
    """Move powers of two between norms and linears, v and o, up and down."""

    contract = Close(atol=0.0, rtol=0.0)  # weights move, and what is computed does not
    idempotent = False  # rounded factors leave something to balance

    pairs: tuple[Literal["norm-linear", "v-o", "up-down"], ...] = KINDS
    """norm-linear (a norm and all linears that read it), v-o (also where heads share keys and values) and up-down
    (the two sides of a gated MLP)."""

    strength: float = 0.5
    """0 moves nothing, 0.5 makes both sides equally large, 1 makes all columns equally large."""

    def check(self, graph: Graph) -> Sequence[QcError]:
        """A strength without meaning, and a graph without such pairs."""
        if not 0 <= self.strength <= 1:
            return [QcError(f"strength {self.strength:g} is not between 0 and 1", fix="write 0.5")]
        if not self._found(graph):
            what = f"no {' or '.join(self.pairs)} pair of float weights is here"
            return [QcError(what, fix="run equalize before quantize-base, or take it out")]
        return []

    def _found(self, graph: Graph) -> list[object]:
        return [pair for pair in pairs(graph, self.pairs) if self.select.accepts(pair.source, graph.blocks)]

    def run(self, graph: Graph) -> Report:
        """Balance one pair after the other."""
        changed: dict[str, None] = {}
        columns = 0
        for pair in pairs(graph, self.pairs):
            if not self.select.accepts(pair.source, graph.blocks):
                continue
            moved = balance(graph, pair, self.strength)
            columns += moved
            if moved:
                changed |= dict.fromkeys([pair.source.name, *(reader.name for reader in pair.readers)])
        return Report(tuple(changed), {"columns": columns})
