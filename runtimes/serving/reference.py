"""The graph as a server computes it: weights packed as they are written, inputs of linears rounded as it rounds them.

x' = qc.fake_quantize_input(x, nvfp4, 16, global_scale=…)
linear(x', qc.dequantize_scaled(W.indices, W.scale, nvfp4, model, global_scale=…))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from graph import Graph, TensorInfo
from graph.formats import fake_quantize_input, store_packed
from runtimes.serving.caches import round_kept
from runtimes.serving.gelu import spell_out
from runtimes.serving.layout import input_tensors
from runtimes.serving.plan import Part, Plan
from runtimes.serving.settings import Serving


def served(
    plan: Plan,
    largest: Mapping[str, float],
    dtype: torch.dtype = torch.float32,
    kept: Mapping[str, tuple[float, float]] | None = None,
    scale_dtype: torch.dtype = torch.float32,
) -> Graph:
    """Another graph, in ``dtype``; that of the plan is left as it is.

    ``largest``: the largest magnitude that each linear reads, by its weight's module, where inputs are calibrated.
    ``kept``: those of keys and values, by the attention that keeps them, if they are rounded; their scales have
    ``scale_dtype``.
    """
    twin = plan.graph.copy()
    if twin.dtype is not dtype:
        twin.to(dtype)
    spell_out(twin)
    rounded: dict[tuple[fx.Node, float, tuple[str, int]], fx.Node] = {}
    sites = {site.name: site for site in twin.sites("aten.linear")}
    for part in plan.parts:
        if part.packed is None:
            store_packed(twin, part.name, part.form, plan.sides(part))
    for part in plan.parts:
        site = sites[part.linear.name]
        if part.settings.inputs is None or part.rounded is not None:
            continue
        seen = largest.get(part.module, 0.0)
        key = (site.input(0), seen, part.settings.inputs)
        if key not in rounded:
            rounded[key] = _insert(twin, part, site.node, part.settings, seen)
        site.set_input(0, rounded[key])
    if kept is not None:
        round_kept(twin, kept, scale_dtype)
    twin.verify()
    return twin


def _insert(graph: Graph, part: Part, linear: fx.Node, settings: Serving, seen: float) -> fx.Node:
    assert settings.inputs is not None
    kind, columns = settings.inputs
    sides: dict[str, Any] = {}
    for suffix, value in _divisors(settings, seen).items():
        name = f"{part.module}.input_{suffix}"
        info = TensorInfo(kind="buffer", pinned=True, saved=False)
        sides[suffix] = graph.add_tensor(name, value, before=linear, info=info)
    x = linear.args[0]
    name = f"{part.module}/input"
    return graph.insert(fake_quantize_input, x, kind, columns, name=name, before=linear, role="other", **sides)


def _divisors(settings: Serving, seen: float) -> dict[str, Tensor]:
    """``scale`` or ``global_scale`` of an input, as the op takes it."""
    as_written = Serving(target=settings.target, scheme=settings.scheme)
    return {suffix.removeprefix("input_"): v for suffix, v in input_tensors(as_written, seen).items()}
