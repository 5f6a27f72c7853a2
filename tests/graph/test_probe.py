"""Probing: inputs that find mistakes, the values at every site, and how far two of them are apart."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graph import Graph, TensorInfo, capture, capture_module
from graph.probe import (
    constants,
    evaluate_constant,
    failing_site,
    probe_inputs,
    psnr_db,
    run,
    snr_db,
    values_by_site,
    vocabulary,
)
from tests.graph.tiny import checkpoint, model, qwen


def test_probe_inputs_are_random_tokens_with_padding_and_always_the_same() -> None:
    first, again, other = probe_inputs(qwen()), probe_inputs(qwen()), probe_inputs(qwen(), seed=1)
    ids, mask = first["input_ids"], first["attention_mask"]
    assert ids.shape == mask.shape == (2, 16)
    assert int(ids.max()) < vocabulary(qwen()) == 50
    assert torch.equal(ids, again["input_ids"])
    assert not torch.equal(ids, other["input_ids"])
    assert mask[:-1].all()
    assert mask[-1].tolist() == [1] * 14 + [0] * 2
    assert probe_inputs(qwen(), batch=1, length=5)["input_ids"].shape == (1, 5)


def test_inputs_with_a_default_are_left_to_it() -> None:
    graph = capture_module(nn.Linear(4, 4), torch.ones(2, 4))
    graph.add_input("training", False, default=False)
    assert probe_inputs(graph).keys() == {"input"}
    assert probe_inputs(graph)["input"].shape == (2, 4)


def test_every_site_has_its_value_in_order() -> None:
    graph = qwen(1)
    inputs = probe_inputs(graph)
    values = values_by_site(graph, inputs)
    tensors = [site.name for site in graph.sites() if isinstance(site.value, torch.Tensor)]
    assert list(values) == tensors
    assert torch.equal(values["lm_head"], run(graph, inputs)[0])


@pytest.mark.peer
def test_values_are_those_of_the_models_own_modules() -> None:
    graph = qwen(1)
    seen: dict[str, Any] = {}
    hooks = [
        module.register_forward_hook(lambda m, args, out, name=name: seen.__setitem__(name, out))
        for name, module in model(1).named_modules()
        if not list(module.children()) and name
    ]
    inputs = probe_inputs(graph)
    with torch.no_grad():
        model(1)(**inputs)
    for hook in hooks:
        hook.remove()
    values = values_by_site(graph, inputs)
    shared = [name for name in seen if name in values]
    assert len(shared) >= 12
    assert all(torch.equal(values[name], seen[name]) for name in shared)


def test_a_graph_that_lies_on_disk_gives_the_same_values_and_stays_there(tmp_path: Path) -> None:
    graph = capture(str(checkpoint(tmp_path, 1)))
    lazy = graph.lazy()
    inputs = probe_inputs(graph)
    streamed = values_by_site(graph, inputs)
    assert graph.lazy() == lazy
    assert lazy
    whole = values_by_site(graph.materialize(), inputs)
    assert streamed.keys() == whole.keys()
    assert all(torch.equal(streamed[name], whole[name]) for name in whole)
    assert torch.equal(whole["lm_head"], run(qwen(1), inputs)[0])


def test_the_site_that_fails_is_found() -> None:
    graph = qwen(1)
    inputs = probe_inputs(graph)
    assert failing_site(graph, inputs) is None
    graph.set_tensor("model.layers.0.mlp.up_proj.weight", torch.ones(64, 32, dtype=torch.float64))
    assert failing_site(graph, inputs) == "model.layers.0.mlp.up_proj"


def doubled() -> Graph:
    """linear(x, 2 W + 0, b)."""
    graph = capture_module(nn.Linear(4, 3), torch.ones(2, 4))
    linear = graph.sites("aten.linear")[0]
    zero = graph.add_tensor("zero", torch.zeros(3, 4), before=linear.node, info=TensorInfo(kind="buffer"))
    twice = graph.insert("aten.mul.Tensor", linear.input(1), 2.0, name="twice", before=linear.node)
    linear.set_input(1, graph.insert("aten.add.Tensor", twice, zero, name="sum", before=linear.node))
    return graph


def test_constants_are_named_and_evaluated_without_the_rest() -> None:
    graph = doubled()
    linear = graph.site("linear")
    found = dict(constants(linear))
    assert list(found) == ["weight", "bias"]
    weight = evaluate_constant(graph, found["weight"])
    assert torch.equal(weight, 2 * graph.tensor("weight"))
    assert not weight.requires_grad
    assert not evaluate_constant(graph, found["bias"]).requires_grad
    with pytest.raises(AssertionError, match="linear depends on an input"):
        evaluate_constant(graph, linear.node)


def test_ratios_in_decibel() -> None:
    reference = torch.tensor([3.0, -4.0])
    assert psnr_db(reference, reference) == snr_db(reference, reference) == math.inf
    assert psnr_db(reference, reference + 0.4) == pytest.approx(20, abs=1e-5)
    assert snr_db(reference, torch.tensor([3.0, -3.5])) == pytest.approx(20, abs=1e-5)
    assert snr_db(reference, torch.zeros(2)) == pytest.approx(0)
    for bad in (math.nan, math.inf):
        assert psnr_db(reference, torch.tensor([3.0, bad])) == -math.inf
        assert snr_db(reference, torch.tensor([3.0, bad])) == -math.inf
    assert snr_db(torch.zeros(2), torch.ones(2)) < -1000
    assert psnr_db(torch.zeros(2), torch.zeros(2)) == math.inf
