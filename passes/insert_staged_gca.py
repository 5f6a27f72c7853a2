"""Let a decoder look at documents first and at their tokens later: staged gated cross-attention.

    before    x = add(h, mlp)                               behind block 6
              z = add(h, mlp)                               behind block 9
    after     w = document_weights(q of x, k of the memory, memory/last)
              x.gca.coarse.add = qc.add_gated(x, attention to the last tokens of documents, …)
              z.gca.fine.attention = qc.memory_attention(q, k, v, memory/seen, prior=w of each token's document)
              z.gca.fine.add = qc.add_gated(z, …)

A pair is a coarse block, which weighs documents by the states of their last tokens, and ``gap`` blocks further a fine
one, which reads tokens with those weights known beforehand. Where a fine block and the coarse one of the next pair
stand behind the same block, the fine one comes first. Documents are the numbers in ``memory_mask``; ``attach-memory``
numbers the chunks of a row. All else is as with ``insert-gca``, of which it takes the place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from graph import Graph, QcError, raise_all
from graph.gca import add_memory_inputs, insert_block, places
from graph.sites import node_name
from graph.staged import insert_last_tokens, weigh_documents
from passes.base import Report
from passes.gca_options import CrossAttention, freeze_rest, new_values


@dataclass(frozen=True, kw_only=True)
class InsertStagedGca(CrossAttention):
    """Insert pairs of coarse and fine gated cross-attention to a memory of several documents."""

    pairs: int = 4
    """How many coarse blocks, each with its fine one."""

    start: int = 6
    """The block behind which the first coarse one stands."""

    gap: int = 3
    """Blocks from a coarse one to its fine one, and to the coarse one of the next pair."""

    per_position: bool = True
    """Weigh documents anew at every position. Otherwise by all of the text at once, so that a token is read by what
    comes behind it: only for texts that are read as a whole."""

    def _mistakes(self) -> Iterator[QcError]:
        for key in ("pairs", "gap"):
            if getattr(self, key) < 1:
                yield QcError(f"{key} is {getattr(self, key)}", fix="give a number from 1")
        if self.start < 0:
            yield QcError(f"start is {self.start}", fix="give the number of a block, from 0 on")
        yield from super()._mistakes()

    def layers(self) -> list[int]:
        """The blocks behind which something is inserted: the first has no fine block, the last no coarse one."""
        return [self.start + self.gap * pair for pair in range(self.pairs + 1)]

    def check(self, graph: Graph) -> Sequence[QcError]:
        """Blocks that there are not, heads that do not divide, a graph that is no decoder or has a memory already."""
        problem = self._no_decoder(graph)
        if problem is not None:
            return [problem]
        last = self.layers()[-1]
        if last >= graph.blocks:
            what = f"{self.pairs} pairs from block {self.start} on, {self.gap} apart, end behind block {last}"
            return [QcError(f"{what}; there are {graph.blocks}", fix=self._that_fits(graph.blocks))]
        found = places(graph, "block_out")
        gone = [block for block in self.layers() if block not in found]
        if gone:
            return [QcError(f"block {gone[0]} has no residual sum at its block_out", fix="choose another start or gap")]
        return [error for block in self.layers() for error in self._unfit(graph, block, found[block])]

    def _that_fits(self, blocks: int) -> str:
        pairs = (blocks - 1 - self.start) // self.gap
        if pairs > 0:
            return f"set pairs to at most {pairs}, or lower start or gap"
        return f"set start to 0, gap to 1 and pairs to at most {blocks - 1}" if blocks > 1 else "use insert-gca"

    def run(self, graph: Graph) -> Report:
        """Insert the pairs, from the first block to the last, and freeze what is not trained on purpose."""
        raise_all(list(self.check(graph)))
        freeze_rest(graph)
        found = places(graph, "block_out")
        memory = add_memory_inputs(graph, self._memory_width(found[self.start]), self.separate_values)
        last = insert_last_tokens(graph, memory)
        known, prior = set(graph.tensors()), None
        for block in self.layers():
            x = found[block]
            form = self._form(graph, block, x)
            if prior is not None:
                x = insert_block(graph, x, memory, form, "fine", prior).added
            if block != self.layers()[-1]:
                coarse = insert_block(graph, x, (*memory[:2], last), form, "coarse")
                prior = weigh_documents(graph, coarse, last, self.per_position)
        figures: dict[str, float | int | str] = {
            "layers": ", ".join(map(str, self.layers())),
            "trainable_values": new_values(graph, known),
        }
        return Report(tuple(node_name(found[block]) for block in self.layers()), figures)
