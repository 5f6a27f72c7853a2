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

from graph import Graph, QcError, TensorInfo
from graph.gca import is_plan
from graph.sites import node_name, set_tag
from passes.base import Exact, Pass, Report

GROUP = "encoder.memory"
"""The group that trains them."""

NAMES = ("memory_key", "memory_value")


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
        for name, info in graph.tensors().items():
            if info.trainable and info.group is None:
                graph.set_info(name, trainable=False)
        (states,) = graph.output_nodes()
        inputs = int(states.meta["val"].shape[-1])
        width, end = self.width or inputs, graph.module.graph.output_node()
        device = "meta" if is_plan(graph) else graph.device
        dtype = torch.float32 if self.dtype == "fp32" else graph.dtype
        info = TensorInfo(trainable=True, group=GROUP, role="gca.project", pinned=self.dtype == "fp32")
        outputs = []
        for name in NAMES:
            value = torch.eye(width, inputs, dtype=dtype, device=device)
            weight = graph.add_tensor(f"{name}.weight", value, before=end, info=info)
            if self.dtype == "fp32":
                weight = graph.insert("aten.to.dtype", weight, graph.dtype, name=f"{name}/cast", before=end)
                set_tag(weight, model_dtype=True)
            outputs.append(graph.insert("aten.linear", states, weight, name=name, before=end, role="gca.project"))
        graph.set_outputs(outputs)
        return Report((node_name(states),), {"width": width, "trainable_values": 2 * width * inputs})
