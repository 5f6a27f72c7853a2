"""Give an encoder projections of its own for the keys and the values of a memory.

    before    return h
    after     memory_key = linear(h, memory_key.weight)
              memory_value = linear(h, memory_value.weight)
              return memory_key, memory_value

Both begin as the identity, cut or filled up with zeros where ``width`` is not that of the encoder. They store a memory
narrower than the encoder, or bridge two widths; otherwise the projections of insert-gca do as well without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from graph import Graph, QcError
from graph.bridge import KEY, VALUE, project
from graph.sites import node_name
from passes.base import Exact, Pass, Report
from passes.gca_options import freeze_rest


@dataclass(frozen=True, kw_only=True)
class InsertKvProjection(Pass):
    """Return, instead of the last hidden states, two projections of them that train."""

    contract = Exact()
    idempotent = False
    after = ("quantize-base",)

    width: int | None = None
    """Width of keys and values; without it, that of the encoder."""

    dtype: Literal["fp32", "model"] = "fp32"
    """Dtype in which the projections are kept: fp32 whatever the graph runs in, or the graph's."""

    def __post_init__(self) -> None:
        if self.width is not None and self.width < 1:
            raise QcError(f"width is {self.width}", fix="give a number from 1; the width of the decoder is usual")
        object.__setattr__(self, "new_outputs", self.width is not None)

    def check(self, graph: Graph) -> Sequence[QcError]:
        """A graph that is no encoder, or has them already."""
        if graph.kind == "causal-lm":
            return [QcError("the graph is a language model, not an encoder", fix="give it kind: encoder under models:")]
        if len(graph.output_nodes()) > 1:
            return [QcError("the encoder returns keys and values already", fix="take insert-kv-projection out")]
        return []

    def run(self, graph: Graph) -> Report:
        """Put the projections behind the last hidden states."""
        for error in self.check(graph):
            raise error
        freeze_rest(graph)
        inputs = int(graph.output_nodes()[0].meta["val"].shape[-1])
        width = self.width or inputs
        states = project(graph, (KEY, VALUE), width, torch.float32 if self.dtype == "fp32" else None)
        return Report((node_name(states),), {"width": width, "trainable_values": 2 * width * inputs})
