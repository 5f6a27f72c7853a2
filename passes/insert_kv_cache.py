"""Let a decoder continue from the keys and values of what it read before.

    before    model/unsqueeze = unsqueeze(model/arange, 0)
              model/attention_mask = qc.attention_mask(attention_mask)
              attention = qc.attention(q, k, v, model/attention_mask, 0.25)
    after     model/positions = qc.positions(input_ids, past_mask, first_position)
              model/cached_attention_mask = qc.cached_attention_mask(attention_mask, past_mask)
              attention.key = qc.update_cache(k, past_key_0, past_mask)
              attention.value = qc.update_cache(v, past_value_0, past_mask)
              attention = qc.attention(q, attention.key, attention.value, model/cached_attention_mask, 0.25)

Without the new inputs the graph computes what it did. ``graph/cache.py`` says what they are, and has the buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graph import Graph, QcError
from graph.cache import has_cache, insert_cache, obstacles
from passes.base import Exact, Pass, Report


@dataclass(frozen=True, kw_only=True)
class InsertKvCache(Pass):
    """Give every attention a key/value cache, and shift positions and masks by the length of the past.

    All attentions take part, so ``select`` may leave none out. A model in which anything but attention and
    positions looks from one token to another is refused, with the site.
    """

    contract = Exact()

    def run(self, graph: Graph) -> Report:
        """Rewrite all of the graph."""
        if not has_cache(graph):
            for error in self.check(graph):
                raise error
        changed = tuple(insert_cache(graph))
        return Report(changed, {"caches": len(changed)})

    def check(self, graph: Graph) -> Sequence[QcError]:
        """Every site that stands in the way."""
        attentions = graph.sites("qc.attention")
        if attentions:
            chosen = {site.name for site in self.select.pick(attentions, graph.blocks)}
            left = [site.name for site in attentions if site.name not in chosen]
            if left:
                what = f"select leaves out the attention {left[0]}"
                return [QcError(what, site=left[0], fix="remove select: all attentions have a past, or none")]
        return [] if has_cache(graph) else obstacles(graph)
