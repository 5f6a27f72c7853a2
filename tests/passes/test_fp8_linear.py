"""FP8 products for linears that train: what they round, what they leave alone, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graph import Graph, Selector
from graph.artifact import load, save
from graph.fp8_linear import linear_fp8
from graph.text import diff
from passes.fp8_linear import Fp8Linear
from passes.insert_gca import InsertGca
from passes.runner import apply
from tests.graph.tiny import qwen
from tests.passes.memories import decoder, memory, tokens

UPDATES = [f"model.layers.{block}.gca.{letter}_proj" for block in (0, 1) for letter in "qkvo"]


def run(graph: Graph, **inputs: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = graph(input_ids=tokens(), memory=memory(), **inputs)
    return found


def test_linears_that_train_are_computed_in_fp8_and_no_others() -> None:
    graph = decoder()
    before = str(graph)
    report = apply(Fp8Linear(), graph)
    assert list(report.changed) == UPDATES
    added = [line[1:] for line in diff(before, str(graph)).splitlines()[2:] if line.startswith("+")]
    assert added[:2] == [
        "training: bool = False",
        "model.layers.0.gca.q_proj = qc.linear_fp8(model.layers.0.gca.norm, model.layers.0.gca.q_proj/cast, None, "
        "training, tensorwise) : f32[B, T, 32]",
    ]
    assert len(added) == 1 + len(UPDATES)


def test_a_second_run_finds_nothing_to_do() -> None:
    graph = decoder()
    apply(Fp8Linear(), graph)
    text = str(graph)
    assert apply(Fp8Linear(), graph).changed == ()
    assert str(graph) == text


def test_in_evaluation_it_is_the_model_to_the_bit_and_in_training_near_it() -> None:
    graph = decoder()
    whole = run(graph)
    apply(Fp8Linear(), graph)
    assert torch.equal(run(graph), whole)
    found = run(graph, training=True)
    assert 1e-4 < float((found - whole).norm() / whole.norm()) < 0.1


@pytest.mark.parametrize("scaling", ["tensorwise", "rowwise"])
def test_values_and_gradients_are_those_of_a_linear_rounded_to_three_bits_of_mantissa(scaling: str) -> None:
    torch.manual_seed(0)
    x, w, b = torch.randn(2, 24, 64), torch.randn(48, 64), torch.randn(48)
    seen = []
    for training in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        y = linear_fp8(leaves[0], leaves[1], leaves[2], training, scaling)
        seen.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
    for plain, rounded in zip(*seen, strict=True):
        assert 0 < float((plain - rounded).norm() / plain.norm()) < 0.09
    rows = x.flatten(0, 1)
    if scaling == "tensorwise":  # every product is of e4m3 numbers
        scale = [448 / t.abs().max() for t in (rows, w)]
        x8, w8 = ((t * s).to(torch.float8_e4m3fn).float() for t, s in zip((rows, w), scale, strict=True))
        wanted = (x8 @ w8.T / (scale[0] * scale[1])).view(2, 24, 48) + b
        assert (wanted - seen[1][0]).abs().max() < 1e-4


def test_a_memory_without_tokens_trains_too() -> None:
    x = torch.zeros(2, 0, 64, requires_grad=True)
    assert linear_fp8(x, torch.ones(16, 64), None, True).shape == (2, 0, 16)


def narrow() -> Graph:
    """A decoder whose keys and values of the memory have 8 features."""
    graph = qwen()
    apply(InsertGca(layers=(1,), heads=4, kv_heads=1), graph)
    return graph


def test_what_is_no_multiple_of_16_is_left_and_told() -> None:
    report = apply(Fp8Linear(), narrow())
    assert report.changed == ("model.layers.1.gca.q_proj", "model.layers.1.gca.o_proj")
    left = "model.layers.1.gca.k_proj [8, 32], model.layers.1.gca.v_proj [8, 32]"
    assert report.figures == {"linears": 2, "left": left}


def test_an_artifact_of_it_is_read_back_and_the_pass_takes_itself_out(tmp_path: Path) -> None:
    graph = decoder()
    text, whole = str(graph), run(graph)
    apply(Fp8Linear(scaling="rowwise"), graph)
    save(tmp_path / "artifact", graph)
    read = load(tmp_path / "artifact").graph
    assert str(read) == str(graph)
    report = apply(Fp8Linear(scaling="none"), read)
    assert list(report.changed) == UPDATES
    assert str(read).replace("training: bool = False\n", "") == text
    assert torch.equal(run(read), whole)


def test_a_selection_with_nothing_to_compute_in_fp8_is_refused() -> None:
    (error,) = Fp8Linear(select=Selector(name="*.gca.k_proj")).check(narrow())
    assert str(error) == (
        "model.layers.1.gca.k_proj has a weight of [8, 32], of which FP8 multiplies blocks of 16\n"
        "  site   model.layers.1.gca.k_proj\n"
        "  fix    select linears of such sizes, or leave fp8-linear out"
    )
    frozen = qwen()
    for name in frozen.tensors():
        frozen.set_info(name, trainable=False)
    (error,) = Fp8Linear().check(frozen)
    assert str(error) == (
        "select {trainable: true} matches no linear\n"
        "  fix    each condition matches something, but no item matches all; take one away"
    )


@pytest.mark.gpu
def test_a_gpu_with_fp8_units_gives_what_is_emulated_elsewhere() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(256, 128).bfloat16(), torch.randn(64, 128).bfloat16()
    emulated = linear_fp8(x, w, None, True)
    found = linear_fp8(x.cuda(), w.cuda(), None, True).cpu()
    assert float((found - emulated).norm() / emulated.norm()) < 5e-3
