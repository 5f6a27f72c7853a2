"""Let a decoder be given the keys and values of its memory, worked out once and not for every token.

    before    attention = qc.memory_attention(q, k, v, memory/seen)
    after     attention.key = qc.prepared(k, memory_key_0)
              attention.value = qc.prepared(v, memory_value_0)
              attention = qc.memory_attention(q, attention.key, attention.value, memory/seen)

Without the new inputs the graph computes what it did. ``graph/prepared.py`` says what they are: it works them out, and
parts the graph into one that makes them and a decoder that has no other way to a memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graph import Graph, QcError
from graph.prepared import hoist, is_hoisted
from passes.base import Exact, Pass, Report


@dataclass(frozen=True, kw_only=True)
class HoistMemoryKv(Pass):
    """Let every attention to a memory take keys and values that were worked out before.

    All of them take part, so ``select`` may leave none out.
    """

    contract = Exact()

    def check(self, graph: Graph) -> Sequence[QcError]:
        """A graph that reads no memory, and a selection that leaves an attention out."""
        attentions = graph.sites("qc.memory_attention")
        if not attentions:
            return [QcError("the graph reads no memory", fix="run insert-gca first, or leave hoist-memory-kv out")]
        chosen = {site.name for site in self.select.pick(attentions, graph.blocks)}
        left = [site.name for site in attentions if site.name not in chosen]
        if left:
            what = f"select leaves out {left[0]}"
            return [QcError(what, site=left[0], fix="remove select: all of them are prepared, or none")]
        return []

    def run(self, graph: Graph) -> Report:
        """Rewrite all of the graph."""
        for error in self.check(graph):
            raise error
        changed = () if is_hoisted(graph) else tuple(hoist(graph))
        return Report(changed, {"attentions": len(graph.sites("qc.memory_attention")) if changed else 0})
