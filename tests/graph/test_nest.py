"""Flat and nested are the same graph: the same text, tensors, values, and blocks that a runtime can wrap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from graph import Graph, capture, capture_module
from graph.nest import Nested, flatten, nest
from graph.probe import probe_inputs
from passes.add_lora import AddLora
from passes.quantize_base import QuantizeBase
from tests.architectures import CAUSAL, ENCODERS, REFUSED, config, maker
from tests.graph.tiny import qwen

BLOCKS = ("model.layers.0", "model.layers.1")


def trained() -> Graph:
    """A packed base with LoRA whose dropout is off."""
    graph = qwen()
    QuantizeBase(block=32).run(graph)
    AddLora(rank=2, dropout=0.1).run(graph)
    for name, info in graph.tensors().items():
        if info.trainable:
            graph.set_tensor(name, torch.randn(graph.shape(name), generator=torch.Generator().manual_seed(len(name))))
    graph.verify()
    return graph


def flat_again(graph: Graph, nested: Nested) -> Graph:
    """A graph out of the nodes that nesting and flattening made."""
    values = {name: graph.tensor(name) for name in graph.tensors()}
    back = Graph(flatten(nested), values, graph.tensors(), dtype=graph.dtype, config=graph.config, blocks=graph.blocks)
    back.verify()
    return back


@pytest.mark.parametrize("make", [qwen, trained])
def test_nested_and_flat_again_the_graph_has_the_same_text_and_values(make: Callable[[], Graph]) -> None:
    graph = make()
    nested, inputs = nest(graph), probe_inputs(graph, batch=3, length=9)
    back = flat_again(graph, nested)
    assert str(back) == str(graph)
    wanted = graph(**inputs)
    assert torch.equal(nested(**inputs), wanted)
    assert torch.equal(back(**inputs), wanted)


@pytest.mark.parametrize("make", [qwen, trained])
def test_tensors_keep_their_names_and_are_shared(make: Callable[[], Graph]) -> None:
    graph = make()
    nested = nest(graph)
    held = dict(nested.named_parameters()) | dict(nested.named_buffers())
    assert held.keys() == graph.tensors().keys()
    for name, value in held.items():
        assert value.data_ptr() == graph.tensor(name).data_ptr(), name
        assert value.requires_grad == graph.info(name).trainable, name


def test_every_block_is_a_child_that_holds_its_own_tensors() -> None:
    nested = nest(qwen())
    assert nested.qc_blocks == BLOCKS
    assert [str(node.target) for node in nested.graph.nodes if node.op == "call_module"] == list(BLOCKS)
    for path in BLOCKS:
        block = nested.get_submodule(path)
        assert isinstance(block, fx.GraphModule)
        assert sorted(name for name, _ in block.named_parameters()) == sorted(
            name.removeprefix(f"{path}.") for name in qwen().tensors() if name.startswith(f"{path}.")
        )


def gradients(module: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    module.zero_grad()
    module(**inputs).pow(2).sum().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def test_gradients_are_the_same_flat_nested_and_checkpointed() -> None:
    graph = trained()
    inputs = probe_inputs(graph)
    wanted, nested = gradients(graph.module, inputs), nest(graph)
    assert wanted.keys() == {name for name, info in graph.tensors().items() if info.trainable}
    for found in (gradients(nested, inputs), gradients(checkpointed(nested), inputs)):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def checkpointed(nested: Nested) -> Nested:
    """Every block forgets its activations and computes them again in the backward."""

    def forgetting(forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: checkpoint(forward, *args, use_reentrant=False)

    for path in nested.qc_blocks:
        block = nested.get_submodule(path)
        block.forward = forgetting(block.forward)
    return nested


def test_a_graph_without_blocks_nests_to_itself() -> None:
    graph = capture_module(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.ones(1, 3))
    nested = nest(graph)
    assert nested.qc_blocks == ()
    assert torch.equal(nested(torch.ones(1, 3)), graph(torch.ones(1, 3)))
    assert str(flat_again(graph, nested)) == str(graph)


QUICK = ("gpt_neox", "bert")
EVERY = [
    pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in (*CAUSAL, *ENCODERS) if n not in REFUSED
]


@pytest.mark.parametrize("name", EVERY)
def test_every_architecture_nests_by_block(name: str) -> None:
    graph = capture(maker(name).from_config(config(name)).eval())
    nested, inputs = nest(graph), probe_inputs(graph)
    assert len(nested.qc_blocks) == graph.blocks
    assert torch.equal(nested(**inputs), graph(**inputs))
    assert sorted(str(flat_again(graph, nested)).splitlines()) == sorted(str(graph).splitlines())
