"""Probing a graph: fixed inputs, the values at every site, the effective weights, and how far two values are apart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graph.core import Graph, Streaming
from graph.sites import Site, is_constant, node_name

CHUNK = 1 << 20

CHUNKS, MEMORIES = ("memory_ids", "memory_attention"), ("memory", "memory_value", "memory_mask")
"""Inputs that may be left out, and that a probe gives all the same: the first where there are some, or the others."""

MASKS = ("attention_mask", "memory_mask", "memory_attention")
"""Inputs in which 0 is padding."""


def probe_inputs(graph: Graph, *, batch: int = 2, length: int = 16, seed: int = 0) -> dict[str, Any]:
    """Inputs for every input without a default: random tokens, the last row padded at its end, random numbers.

    A memory is given too, though a graph can do without: what reads it shall be seen.
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Any] = {}
    sizes = {"B": batch, "T": length, "C": 2}
    memories = CHUNKS if CHUNKS[0] in graph.inputs else MEMORIES
    for node in graph.module.graph.nodes:
        if node.op != "placeholder" or (node.args and node.target not in memories):
            continue
        value = node.meta["val"]
        assert isinstance(value, Tensor), f"input {node.target} has no example"
        shape = [sizes.get(d, length) if isinstance(d, str) else int(d) for d in node.meta.get("dims", value.shape)]
        if node.target in MASKS:
            found[node.target] = torch.ones(shape, dtype=value.dtype)
            found[node.target][-1, ..., -max(1, length // 8) :] = 0
        elif value.dtype.is_floating_point:
            found[node.target] = torch.randn(shape, generator=generator).to(value.dtype)
        else:
            found[node.target] = torch.randint(0, known(graph, node), shape, generator=generator).to(value.dtype)
    return {name: value.to(graph.device) for name, value in found.items()}


def known(graph: Graph, ids: fx.Node) -> int:
    """The number of tokens that every table knows which the input ``ids`` is looked up in."""
    tables = [s.input(0) for s in graph.sites("aten.embedding") if ids in _sources(s.input(1))]
    return min((int(table.meta["val"].shape[0]) for table in tables), default=vocabulary(graph))


def _sources(node: fx.Node) -> set[fx.Node]:
    """The tensors that the values of ``node`` come from."""
    found, pending = set(), [node]
    while pending:
        here = pending.pop()
        if here not in found and isinstance(here.meta["val"], Tensor):
            found.add(here)
            pending += here.all_input_nodes
    return found


def vocabulary(graph: Graph) -> int:
    """The number of tokens the embedding of ``input_ids`` knows."""
    for site in graph.sites("aten.embedding"):
        ids = site.node.args[1]
        table = site.node.args[0]
        if isinstance(ids, fx.Node) and ids.op == "placeholder" and isinstance(table, fx.Node):
            return int(table.meta["val"].shape[0])
    return int(graph.config.get("vocab_size", 2))


def padding_tokens(graph: Graph) -> set[int]:
    """The tokens that stand for padding, by the configuration or a table: some models number positions past them."""
    tables = (site.node.args[2] for site in graph.sites("aten.embedding") if site.node.args[2:])
    return {token for token in (graph.config.get("pad_token_id"), *tables) if isinstance(token, int)}


def run(graph: Graph, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """The outputs in evaluation mode, without gradients."""
    with torch.no_grad():
        outputs = graph(**inputs)
    return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)


def values_by_site(graph: Graph, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """What every site returns, in order of the graph; sites that return no tensor are left out."""
    recorder = _Recorder(graph)
    recorder.run_with(inputs)
    return recorder.values


def failing_site(graph: Graph, inputs: dict[str, Any]) -> str | None:
    """The site whose op fails on these inputs; None where all of them run."""
    recorder = _Recorder(graph)
    try:
        recorder.run_with(inputs)
    except RuntimeError:
        return recorder.at
    return None


class _Recorder(Streaming):
    def __init__(self, graph: Graph):
        super().__init__(graph)
        self.values: dict[str, Tensor] = {}
        self.at: str | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.at = node_name(n)
        result = super().run_node(n)
        if n.op == "call_function" and isinstance(result, Tensor):
            self.values[node_name(n)] = result
        return result


def constants(site: Site) -> Iterator[tuple[str, fx.Node]]:
    """The arguments of a site that depend on stored tensors only: ``weight``, ``bias`` or their position."""
    names = {"aten.linear": {1: "weight", 2: "bias"}, "aten.embedding": {0: "weight"}}.get(site.op, {})
    for i, arg in enumerate(site.node.args):
        if isinstance(arg, fx.Node) and is_constant(arg):
            yield names.get(i, f"argument {i}"), arg


def evaluate_constant(graph: Graph, node: fx.Node) -> Tensor:
    """The value of a node that depends on stored tensors only; nothing else is computed or kept."""
    if node.op == "get_attr":
        return graph.tensor(str(node.target)).detach()
    assert is_constant(node) and callable(node.target), f"{node_name(node)} depends on an input"
    with torch.no_grad():
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: evaluate_constant(graph, n))
        value: Tensor = node.target(*args, **kwargs)
    return value


def evaluate(graph: Graph, nodes: Sequence[fx.Node], inputs: dict[str, Any]) -> list[Any]:
    """The values of some nodes for the given inputs; of the rest of the graph only what they need is computed."""
    wanted: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in wanted:
            wanted.add(node)
            pending += node.all_input_nodes
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in graph.module.graph.nodes:
            if node not in wanted:
                continue
            if node.op == "placeholder":
                values[node] = inputs[str(node.target)] if str(node.target) in inputs else node.args[0]
            elif node.op == "get_attr":
                values[node] = graph.tensor(str(node.target)).detach()
            else:
                assert callable(node.target)
                args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: values[n])
                values[node] = node.target(*args, **kwargs)
    return [values[node] for node in nodes]


def psnr_db(reference: Tensor, value: Tensor) -> float:
    """Peak signal-to-noise ratio in dB: ``20 log10(max|reference| / rms(value - reference))``; inf where equal."""
    error = (value.double() - reference.double()).pow(2).mean().sqrt().item()
    peak = reference.double().abs().max().item()
    if not math.isfinite(error) or not math.isfinite(peak):
        return -math.inf
    return math.inf if error == 0 else 20 * math.log10(max(peak, 1e-300) / error)


def snr_db(reference: Tensor, value: Tensor) -> float:
    """Signal-to-noise ratio in dB: ``20 log10(|reference| / |value - reference|)``; inf where equal.

    Computed a few values at a time: a weight may be large, and this is asked of every weight.
    """
    signal = noise = 0.0
    for one, other in zip(reference.reshape(-1).split(CHUNK), value.reshape(-1).split(CHUNK), strict=True):
        wide = one.float()
        signal += float(torch.linalg.vector_norm(wide)) ** 2
        noise += float(torch.linalg.vector_norm(other.float() - wide)) ** 2
    if not math.isfinite(noise) or not math.isfinite(signal):
        return -math.inf
    return math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)
