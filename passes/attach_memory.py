"""Join an encoder and a decoder into one graph, in which the one makes the memory that the other reads.

    before    encoder: model.norm(input_ids)      decoder: lm_head(input_ids, memory, memory_mask)
    after     states = encoder.model.norm(memory/chunk_ids, memory/chunk_mask)
              memory/joined = qc.join_chunks(states, memory_attention)
              decoder.lm_head(input_ids, memory/joined, memory/joined_mask)

The chunks of text that a row may look things up in come in as ``memory_ids`` [B, C, S] and ``memory_attention``, which
is 0 at padding. Padding is dropped, and the chunks of a row joined in order. Gradients pass from the decoder into the
encoder. Without chunks the joint graph is the decoder, to the bit.

Where the encoder is wider or narrower than the memory that the decoder reads, a projection goes between them:

    encoder   encoder.memory = linear(states, encoder.memory.weight)

It begins as the identity, cut or filled up with zeros, is kept in fp32, and trains as the group ``encoder.memory``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from graph import Graph, QcError
from graph.bridge import BOTH, project
from graph.joint import Names, join, obstacles, widths
from passes.base import Exact, Pass, Report


@dataclass(frozen=True, kw_only=True)
class AttachMemory(Pass):
    """Link two of the models of a recipe; the passes behind it go over the joint graph."""

    contract = Exact()
    idempotent = False
    links: ClassVar[bool] = True

    encoder: str = "encoder"
    """The name, under ``models:``, of the model that makes the memory."""

    decoder: str = "decoder"
    """The name of the model that reads it."""

    max_tokens: int | None = None
    """Tokens of a memory beyond which it is cut; without it, all are kept."""

    bridge: bool = True
    """Project what the encoder gives where the decoder reads another width; without it, that is an error."""

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise QcError(f"max_tokens is {self.max_tokens}", fix="give a number from 1, or leave it out")

    def check(self, graph: Graph) -> Sequence[QcError]:
        """It needs two graphs."""
        return [QcError("attach-memory joins two models, and there is one", fix="give the recipe models:, and no on:")]

    def run(self, graph: Graph) -> Report:
        """Refuse: one graph cannot be joined."""
        raise self.check(graph)[0]

    def link(self, graphs: Mapping[str, Graph]) -> tuple[Graph, Report]:
        """The joint graph of two of ``graphs``."""
        for key, name in (("encoder", self.encoder), ("decoder", self.decoder)):
            if name not in graphs:
                raise QcError(f"{key} {name!r} is none of the models", fix=f"they are {', '.join(graphs)}")
        if self.encoder == self.decoder:
            raise QcError("encoder and decoder are the same model", fix="name two of the models")
        decoder = graphs[self.decoder]
        encoder, bridged = self._bridged(graphs[self.encoder], decoder)
        for error in obstacles(encoder, decoder):
            raise error
        joint = join(encoder, decoder, Names(self.encoder, self.decoder), self.max_tokens)
        return joint, Report((), {"blocks": joint.blocks, "tensors": len(joint.tensors()), **bridged})

    def _bridged(self, encoder: Graph, decoder: Graph) -> tuple[Graph, dict[str, str]]:
        """The encoder, with a projection behind it where one is wanted, and what to report of that."""
        gives, reads = widths(encoder, decoder)
        if not self.bridge or encoder.kind != "encoder" or (len(gives), len(reads)) != (1, 1) or gives == reads:
            return encoder, {}
        projected = encoder.copy()
        project(projected, (BOTH,), int(reads[0]), torch.float32)
        projected.verify()
        return projected, {"bridge": f"{gives[0]} to {reads[0]}"}
