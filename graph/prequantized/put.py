"""Putting packed weights of a checkpoint into a graph, and the rounding of what their linears read.

before    y = linear(x, W)
after     W/dequantize = qc.dequantize_scaled(W.indices, W.scale, int4, model)
          y = linear(x, W/dequantize)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from graph.core import Graph, TensorInfo
from graph.errors import QcError
from graph.formats.activations import fake_quantize_input
from graph.formats.elements import E4M3
from graph.formats.scales_of import float_scales, global_scale
from graph.formats.stored import store_packed
from graph.prequantized.base import Held, Inputs
from graph.sites import Site, node_name
from graph.weights import Stored


def put(graph: Graph, weights: Mapping[str, Held], *, values: bool = True) -> None:
    """Hold these weights, by their names in the graph, as they are packed. Without ``values`` the graph is a plan."""
    readers = _readers(graph, weights)
    for name, held in weights.items():
        if graph.info(name).transposed:
            what = f"{name} lies the other way round in this architecture, and packed weights are not turned"
            raise QcError(what, fix="give the model before it was quantized, and let quantize-base do it")
        sides = held.load() if values else held.form.pack(torch.empty(held.shape, device="meta"))
        store_packed(graph, name, held.form, sides)
    rounded: dict[tuple[fx.Node, str, int, Any], fx.Node] = {}
    for name, held in weights.items():
        for linear in readers[name] if held.inputs is not None else ():
            _round_input(graph, linear, held.inputs, rounded)
    graph.verify()


def _readers(graph: Graph, weights: Mapping[str, Held]) -> dict[str, list[Site]]:
    """The linears that read each weight, while it is dense."""
    found: dict[str, list[Site]] = {name: [] for name in weights}
    for site in graph.sites("aten.linear"):
        weight = site.weight()
        if weight in found:
            found[weight].append(site)
    lost = next((name for name, sites in found.items() if not sites and weights[name].inputs is not None), None)
    if lost is not None:
        raise QcError(f"no linear of the architecture reads {lost}", fix="config.json and the weights differ")
    return found


def _round_input(
    graph: Graph, linear: Site, inputs: Inputs | None, rounded: dict[tuple[fx.Node, str, int, Any], fx.Node]
) -> None:
    assert inputs is not None
    x = linear.input(0)
    scale = None if inputs.given is None else _one(inputs.given)
    key = (x, inputs.kind, inputs.columns, None if scale is None else float(scale))
    if key not in rounded:
        name = f"{node_name(linear.node)}/{inputs.kind}"
        given: dict[str, Any] = {} if scale is None else _given(graph, linear, inputs, scale)
        rounded[key] = graph.insert(
            fake_quantize_input, x, inputs.kind, inputs.columns, name=name, before=linear.node, role="other", **given
        )
    linear.set_input(0, rounded[key])


def _one(stored: Stored) -> Tensor:
    return stored.load().float().reshape(1)


def _given(graph: Graph, linear: Site, inputs: Inputs, scale: Tensor) -> dict[str, Any]:
    """The largest magnitude that gives this scale, where a number does; otherwise the scale, as a tensor."""
    seen = _seen(inputs.kind, scale)
    if seen is not None:
        return {"seen": seen}
    suffix = "global_scale" if inputs.kind == "nvfp4" else "scale"
    name = f"{node_name(linear.node)}.input_{suffix}"
    info = TensorInfo(kind="buffer", pinned=True)
    return {suffix: graph.add_tensor(name, scale, before=linear.node, info=info)}


def _seen(kind: str, scale: Tensor) -> float | None:
    def of(largest: Tensor) -> Tensor:
        return global_scale(largest[0]) if kind == "nvfp4" else float_scales(largest, E4M3, torch.float32)

    guess = 448.0 * 6.0 / scale if kind == "nvfp4" else scale * 448.0
    up, down = (torch.nextafter(guess, torch.full_like(guess, end)) for end in (torch.inf, -torch.inf))
    return next((float(one) for one in (guess, up, down) if torch.equal(of(one), scale)), None)
