"""Let a decoder look things up in a memory: gated cross-attention behind some of its blocks.

    before    x = add(h, mlp)
    after     x = add(h, mlp)
              x.gca.norm = qc.rms_norm(x, gca.norm.weight, 1e-06, False, True)
              x.gca.attention = qc.memory_attention(q of the norm, k and v of the memory, memory/seen)
              x.gca.add = qc.add_gated(x, linear(x.gca.attention, gca.o_proj.weight), gca.gate, memory/seen, sigmoid)

The memory comes in through new inputs, ``memory`` [B, M, width] and ``memory_mask`` [B, M], or from an encoder that
``attach-memory`` links. Without one, or with a gate at zero, the graph computes what it did, to the bit, and so does
every row of a batch whose mask is zero. What is inserted trains as the group ``gca``; the rest is frozen but for what
another pass put into a group. Gates and norms stay in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from graph import Graph, QcError, raise_all
from graph.gca import add_memory_inputs, insert_block, places
from graph.sites import node_name
from passes.base import Report
from passes.gca_options import CrossAttention, freeze_rest, new_values


@dataclass(frozen=True, kw_only=True)
class InsertGca(CrossAttention):
    """Insert gated cross-attention to a memory behind every n-th block."""

    every_n: int = 3
    """Behind every so many blocks, from ``start`` on."""

    start: int | None = None
    """The first block; without it the block a third of the way up."""

    layers: tuple[int, ...] | None = None
    """Behind these blocks and no others; in the place of ``every_n`` and ``start``."""

    point: Literal["block_out", "after_attn"] = "block_out"
    """Behind the whole block, or between its attention and its MLP."""

    def _mistakes(self) -> Iterator[QcError]:
        if self.layers is not None and (self.every_n, self.start) != (3, None):
            yield QcError("layers stands beside every_n or start", fix="keep layers, or the other two")
        if self.every_n < 1:
            yield QcError(f"every_n is {self.every_n}", fix="give a number from 1")
        yield from super()._mistakes()

    def blocks(self, count: int) -> list[int]:
        """The blocks behind which it goes in a model of ``count`` blocks."""
        if self.layers is not None:
            return sorted(set(self.layers))
        return list(range(count // 3 if self.start is None else self.start, count, self.every_n))

    def check(self, graph: Graph) -> Sequence[QcError]:
        """Blocks that there are not, heads that do not divide, a graph that is no decoder or has a memory already."""
        problem = self._no_decoder(graph)
        if problem is not None:
            return [problem]
        chosen = self.blocks(graph.blocks)
        if not chosen:
            return [QcError(f"start {self.start} leaves none of {graph.blocks} blocks", fix="lower start")]
        wrong = [block for block in chosen if not 0 <= block < graph.blocks]
        if wrong:
            what = f"there is no block {wrong[0]} to put it behind"
            return [QcError(what, fix=f"the blocks are 0 to {graph.blocks - 1}")]
        return [error for block in chosen for error in self._wrong_with(graph, block)]

    def _wrong_with(self, graph: Graph, block: int) -> Iterator[QcError]:
        x = places(graph, self.point).get(block)
        if x is None:
            fix = "set point to block_out" if self.point == "after_attn" else "leave this block out of layers"
            yield QcError(f"block {block} has no residual sum at its {self.point}", fix=fix)
        else:
            yield from self._unfit(graph, block, x)

    def run(self, graph: Graph) -> Report:
        """Insert it, from the first block to the last, and freeze what is not trained on purpose."""
        raise_all(list(self.check(graph)))
        freeze_rest(graph)
        found, chosen = places(graph, self.point), self.blocks(graph.blocks)
        memory = add_memory_inputs(graph, self._memory_width(found[chosen[0]]), self.separate_values)
        known = set(graph.tensors())
        for block in chosen:
            insert_block(graph, found[block], memory, self._form(graph, block, found[block]))
        figures: dict[str, float | int | str] = {
            "layers": ", ".join(map(str, chosen)),
            "trainable_values": new_values(graph, known),
        }
        return Report(tuple(node_name(found[block]) for block in chosen), figures)
