"""Projections behind an encoder: what it gives, as wide as what a decoder reads.

    before    return h
    after     memory = linear(h, memory.weight)
              return memory

A weight begins as the identity, cut or filled up with zeros where the widths differ, and trains.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from graph.core import Graph, TensorInfo
from graph.gca import is_plan
from graph.sites import set_tag

GROUP = "encoder.memory"
"""The group that trains them."""

BOTH, KEY, VALUE = "memory", "memory_key", "memory_value"
"""What projections are called: the one of keys and values alike, and those of each."""


def project(encoder: Graph, names: Sequence[str], width: int, dtype: torch.dtype | None) -> fx.Node:
    """Return, instead of the last hidden states, a projection of them for each name; the node that was returned.

    ``dtype`` is the one in which weights are kept, whatever the graph runs in; without it, they follow the graph.
    """
    (states,) = encoder.output_nodes()
    inputs, end = int(states.meta["val"].shape[-1]), encoder.module.graph.output_node()
    device = "meta" if is_plan(encoder) else encoder.device
    info = TensorInfo(trainable=True, group=GROUP, role="gca.project", pinned=dtype is not None)
    outputs = []
    for name in names:
        value = torch.eye(width, inputs, dtype=dtype or encoder.dtype, device=device)
        weight = encoder.add_tensor(f"{name}.weight", value, before=end, info=info)
        if dtype is not None:
            weight = encoder.insert("aten.to.dtype", weight, encoder.dtype, name=f"{name}/cast", before=end)
            set_tag(weight, model_dtype=True)
        outputs.append(encoder.insert("aten.linear", states, weight, name=name, before=end, role="gca.project"))
    encoder.set_outputs(outputs)
    return states
