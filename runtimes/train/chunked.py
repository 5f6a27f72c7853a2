"""MLPs some tokens at a time: what they make inside is as wide as nothing else, and need never be there as a whole.

    y = down(act(gate(x)) * up(x))    becomes    y = cat(recomputed(x[:, :n]), recomputed(x[:, n:2n]), ...)

Every part keeps its input alone and is computed again in the backward. Values and gradients are those of the whole but
for the order in which gradients of a weight are summed. What depends on no input, a rounded weight, is computed once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from graph import Graph, QcError, Site
from graph.layers import Layer, layers
from graph.ops import op_name
from graph.shapes import dims_of
from graph.sites import is_constant
from graph.tokenwise import mixing


def chunkable(graph: Graph) -> tuple[list[Layer], list[str]]:
    """The MLPs that can run some tokens at a time, and why others cannot."""
    try:
        found = layers(graph, "mlp")
    except QcError as error:
        return [], [error.what]
    why = {layer.name: _refusal(graph, layer) for layer in found}
    refused = [f"{name} {reason}" for name, reason in why.items() if reason]
    return [layer for layer in found if not why[layer.name]], refused


def _refusal(graph: Graph, layer: Layer) -> str | None:
    """Why an MLP has to run as a whole."""
    inside = _inside(layer)
    if any(_token_dim(node) != 1 for node in (layer.x, layer.y)):
        return "does not go from [batch, tokens, width] to the same"
    for node in inside:
        if op_name(node.target) == "qc.dropout":
            return "drops values at random"
        if mixing(Site(graph, node)) is not None:
            return "looks from one token to others"
        if node is not layer.y and any(user not in inside for user in node.users):
            return "is looked into from outside"
    others = {arg for node in inside for arg in node.all_input_nodes} - {layer.x, *inside}
    if any(not is_constant(arg) and _token_dim(arg) is not None for arg in others):
        return "reads more than one value of each token"
    return None


def _inside(layer: Layer) -> list[fx.Node]:
    """The ops of a layer that depend on its x."""
    depends = {layer.x}
    for node in layer.nodes():
        if node.op == "call_function" and any(arg in depends for arg in node.all_input_nodes):
            depends.add(node)
    return [node for node in layer.nodes() if node in depends]


def _token_dim(node: fx.Node) -> int | None:
    """Which dimension of a value is that of the tokens; None where it has none."""
    if not isinstance(node.meta.get("val"), Tensor):
        return None
    return next((i for i, size in enumerate(dims_of(node)) if size == "T"), None)


def run_in_chunks(graph: Graph, found: list[Layer], tokens: int) -> None:
    """Let these MLPs run ``tokens`` tokens at a time. It runs and nests afterwards, and has no ops for them."""
    nodes = graph.module.graph
    for layer in found:
        inside = _inside(layer)
        others = list(dict.fromkeys(arg for node in inside for arg in node.all_input_nodes))
        others = [arg for arg in others if arg is not layer.x and arg not in inside]
        run = _in_chunks(_body(layer, inside, others), tokens, layer.name)
        with nodes.inserting_after(layer.y):
            call = nodes.call_function(run, (layer.x, *others))
        call.meta = dict(layer.y.meta)
        layer.y.replace_all_uses_with(call)
        for node in reversed(inside):
            nodes.erase_node(node)
    graph.module.recompile()


def _body(layer: Layer, inside: list[fx.Node], others: list[fx.Node]) -> fx.GraphModule:
    """A layer as a function of its x and of what else it reads."""
    nodes = fx.Graph()
    copied = {arg: nodes.placeholder(f"arg_{number}") for number, arg in enumerate((layer.x, *others))}
    for node in inside:
        copied[node] = nodes.node_copy(node, copied.__getitem__)
    nodes.output(copied[layer.y])
    return fx.GraphModule(nn.Module(), nodes)


def _in_chunks(body: fx.GraphModule, tokens: int, name: str) -> Callable[..., Tensor]:
    def in_chunks(x: Tensor, *others: object) -> Tensor:
        parts: tuple[Tensor, ...] = torch.split(x, tokens, dim=1)
        if not torch.is_grad_enabled():
            return torch.cat([body(part, *others) for part in parts], dim=1)
        return torch.cat([checkpoint(body, part, *others, use_reentrant=False) for part in parts], dim=1)

    in_chunks.__name__ = in_chunks.__qualname__ = f"{name.replace('.', '_')}_in_chunks"  # what fx calls it
    return in_chunks
