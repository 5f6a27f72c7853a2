"""The values of a captured graph: of a model in memory, of a checkpoint, and what no checkpoint holds."""

from __future__ import annotations

from typing import Any

import torch

from graph.checkpoint import Checkpoint
from graph.core import Graph
from graph.errors import QcError


def bind_live(graph: Graph, model: Any, dtype: torch.dtype | None) -> Graph:
    """Take the tensors of a model in memory; they are shared with it, not copied."""
    state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    model_dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    graph.to(model_dtype)
    for name, info in graph.tensors().items():
        if name not in state:  # a constant of the model's code, adopted by the graph
            continue
        value = state[name].detach()
        graph.set_tensor(name, value.t().contiguous() if info.transposed else value)
    return graph.to(dtype) if dtype not in (None, model_dtype) else graph


def bind_packed(graph: Graph, checkpoint: Checkpoint, model: Any, weights: bool) -> Graph:
    """Hold the weights of a checkpoint as they are packed there; the others stay in their files.

    ``model`` is the transformers model without weights. Without ``weights`` the graph is a plan.
    """
    from graph.prequantized import put

    if checkpoint.is_converted(model):
        what = f"{checkpoint.folder} holds packed weights that transformers joins or parts when it loads them"
        raise QcError(what, fix="give the model before it was quantized, and let quantize-base do it")
    stored, held = checkpoint.bind(graph, model), checkpoint.packed_in(graph, model)
    graph.stored = {name: place for name, place in stored.items() if weights}
    put(graph, held, values=weights)
    fill_in_computed(graph, model)
    graph.verify()
    return graph


def apart(graph: Graph) -> Graph:
    """Another graph of the same nodes, over parameters of its own: what trains in one does not in the other."""
    twin = graph.copy()
    for name, info in twin.tensors().items():
        if info.kind == "parameter":
            value = twin._value(name).detach()
            twin._register(name, torch.empty_like(value) if value.is_meta else value.clone())
    return twin


def fill_in_computed(graph: Graph, model: Any) -> Graph:
    """Compute the buffers that no checkpoint holds by the model's own initialisation, in fp32 unless integers."""
    for path, module in model.named_modules():
        leaves = [leaf for leaf in module._non_persistent_buffers_set if module._buffers.get(leaf) is not None]
        for leaf in leaves:
            wide = torch.float32 if module._buffers[leaf].is_floating_point() else None
            module._buffers[leaf] = torch.zeros_like(module._buffers[leaf], device="cpu", dtype=wide)
        if leaves:
            with torch.no_grad():
                model._init_weights(module)
        for leaf in leaves:
            name = f"{path}.{leaf}" if path else leaf
            if name in graph.tensors():
                graph.set_tensor(name, module._buffers[leaf].to(graph.dtype_of(name)))
    return graph
