from __future__ import annotations

import pytest
import torch

from graph import Graph, QcError, Selector, capture_module
from graph.formats import fuse_dequantize
from passes.add_lora import AddLora
from passes.runner import apply
from passes.snap import Snap
from passes.ste_fp16 import SteFp16
from tests.passes.lut_models import ALL, Mlp, packed, x

SIDES = Selector(name="*.weight.*")
PLAIN = """
x: f32[8, 64]
x/fp16 = qc.ste_fp16(x) : f32[8, 64]
up.weight/fp16 = qc.ste_fp16(up.weight: f32[64, 64]) : f32[64, 64]
up.bias/fp16 = qc.ste_fp16(up.bias: f32[64]) : f32[64]
up = linear(x/fp16, up.weight/fp16, up.bias/fp16) : f32[8, 64]
up/fp16 = qc.ste_fp16(up) : f32[8, 64]
relu = relu(up/fp16) : f32[8, 64]
relu/fp16 = qc.ste_fp16(relu) : f32[8, 64]
down.weight/fp16 = qc.ste_fp16(down.weight: f32[64, 64]) : f32[64, 64]
down = linear(relu/fp16, down.weight/fp16) : f32[8, 64]
down/fp16 = qc.ste_fp16(down) : f32[8, 64]
add = add.Tensor(x, down/fp16) : f32[8, 64]
return add
""".strip()


def test_what_goes_into_a_linear_and_what_comes_out_is_rounded() -> None:
    graph = capture_module(Mlp(), x)
    apply(SteFp16(select=ALL), graph)
    assert str(graph) == PLAIN


def test_lut_weights_round_their_levels_and_factors_themselves() -> None:
    graph = packed()
    apply(SteFp16(select=ALL), graph)
    assert str(graph).count("fp16=True") == 2
    assert "weight/fp16" not in str(graph)


def test_a_second_run_changes_nothing() -> None:
    graph = packed()
    apply(SteFp16(select=ALL), graph)
    before = str(graph)
    assert apply(SteFp16(select=ALL), graph).changed == ()
    assert str(graph) == before


def test_the_graph_that_is_trained_computes_the_bits_of_the_deployed_one() -> None:
    graph = packed()
    apply(SteFp16(select=ALL), graph)
    trained = graph(x)
    fused = graph.copy()
    assert fuse_dequantize(fused) == 2
    assert (fused(x) - trained).abs().max() == 0
    indices = graph.tensor("up.weight.indices").clone()
    apply(Snap(select=SIDES), graph)
    assert (graph(x) - trained).abs().max() == 0
    assert graph.tensor("up.weight.indices").equal(indices)
    assert graph.dtype_of("up.weight.scale_a") == torch.float16
    assert "scale_g" not in str(graph)
    assert apply(Snap(select=SIDES), graph).changed == (), "baked once is baked"


def test_gradients_pass_the_rounding_unchanged() -> None:
    plain, rounded = packed(), packed()
    apply(SteFp16(select=ALL), rounded)
    for name in ("up.weight.scale_g", "up.weight.scale_a"):
        (mine,), (formula,) = (
            torch.autograd.grad(graph(x).square().sum(), graph.tensor(name)) for graph in (rounded, plain)
        )
        torch.testing.assert_close(mine, formula, atol=0.02 * formula.abs().max().item(), rtol=0)
        assert mine.count_nonzero() == mine.numel()


def test_inside_bf16_autocast_it_refuses_to_run() -> None:
    graph = packed()
    apply(SteFp16(select=ALL), graph)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(QcError) as caught:
        graph(x)
    assert str(caught.value) == (
        "fp16 rounding runs inside bf16 autocast, which rounds everything more coarsely already\n"
        "  fix    train in fp32: set precision to fp32, or take ste-fp16 out"
    )


def test_it_comes_before_adapters() -> None:
    graph: Graph = capture_module(Mlp(), x)
    apply(AddLora(rank=2, select=ALL), graph)
    with pytest.raises(QcError) as caught:
        apply(SteFp16(select=ALL), graph)
    assert "up has an adapter already\n  site   up\n  fix    move ste-fp16 before add-lora" in str(caught.value)
