from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from graph import QcError, Selector, capture, capture_module
from graph.formats import dense_value, packed_sites
from passes.dequantize import Dequantize
from passes.quantize_base import QuantizeBase
from passes.runner import apply

ALL = Selector(role="*")
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 64)
        self.down = nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
PLAIN = """
x: f32[3, 64]
up = linear(x, up.weight: f32[64, 64], up.bias: f32[64]) : f32[3, 64]
relu = relu(up) : f32[3, 64]
down = linear(relu, down.weight: f32[64, 64]) : f32[3, 64]
add = add.Tensor(x, down) : f32[3, 64]
return add
""".strip()


@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int8"])
def test_the_graph_reads_float_weights_again_and_computes_the_same(scheme: Any) -> None:
    graph = capture_module(Mlp(), x)
    before = graph(x)
    apply(QuantizeBase(select=ALL, scheme=scheme), graph)
    packed = graph(x)
    values = [dense_value(graph, site) for site in packed_sites(graph)]
    assert apply(Dequantize(), graph).changed == ("up.weight/dequantize", "down.weight/dequantize")
    assert str(graph) == PLAIN
    assert graph(x).equal(packed)
    assert not graph(x).equal(before)
    assert [graph.tensor(n).equal(v) for n, v in zip(("up.weight", "down.weight"), values, strict=True)] == [True, True]
    assert set(graph.tensors()) == {"up.weight", "up.bias", "down.weight"}
    assert not graph.info("up.weight").trainable
    graph.to(torch.bfloat16)
    assert graph.tensor("up.weight").dtype == torch.bfloat16


def test_only_the_selected_weights_are_unpacked() -> None:
    graph = capture_module(Mlp(), x)
    apply(QuantizeBase(select=ALL), graph)
    apply(Dequantize(select=Selector(name="up.*")), graph)
    assert [site.name for site in packed_sites(graph)] == ["down.weight/dequantize"]


def test_packing_and_unpacking_can_go_on_and_on() -> None:
    graph = capture_module(Mlp(), x)
    for _ in range(3):
        apply(QuantizeBase(select=ALL), graph)
        apply(Dequantize(), graph)
    assert str(graph) == PLAIN


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("compute", ["model", "bf16"])
def test_the_float_weights_take_the_dtype_that_is_asked_for(dtype: Any, compute: Any) -> None:
    graph = capture_module(Mlp(), x)
    apply(QuantizeBase(select=ALL, compute_dtype=compute), graph)
    packed, values = graph(x), [dense_value(graph, site) for site in packed_sites(graph)]
    apply(Dequantize(dtype=dtype), graph)
    assert graph.tensor("up.weight").equal(values[0].to(FLOATS[dtype]))
    assert graph.tensor("down.weight").dtype == FLOATS[dtype]
    if dtype in ("fp32", compute):
        assert graph(x).equal(packed)
    assert graph(x).dtype == torch.float32
    graph.to(torch.bfloat16).to(torch.float32)
    pinned = dtype != "fp32" or compute != "model"
    assert graph.tensor("up.weight").dtype == (FLOATS[dtype] if pinned else torch.float32)


def test_model_means_the_dtype_that_the_weights_are_computed_in() -> None:
    graph = capture_module(Mlp(), x)
    apply(QuantizeBase(select=ALL, compute_dtype="bf16"), graph)
    packed = graph(x)
    apply(Dequantize(), graph)
    assert graph.tensor("up.weight").dtype == torch.bfloat16
    assert graph(x).equal(packed)


def test_tied_weights_are_tied_again() -> None:
    config = Qwen3Config(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                         intermediate_size=128, vocab_size=100, tie_word_embeddings=True)  # fmt: skip
    graph = capture(Qwen3ForCausalLM(config).eval())
    text, tensors = str(graph), graph.tensors()
    apply(QuantizeBase(select=ALL), graph)
    apply(Dequantize(), graph)
    assert str(graph) == text
    assert graph.tensors() == tensors
    plan = capture(config)
    apply(QuantizeBase(select=ALL), plan)
    apply(Dequantize(dtype="fp32"), plan)
    assert str(plan) == text


def test_where_nothing_is_packed_there_is_nothing_to_select() -> None:
    with pytest.raises(QcError) as caught:
        apply(Dequantize(), capture_module(Mlp(), x))
    assert str(caught.value) == (
        "select {} matches no site\n  fix    the graph has none at this point; take the pass out or move it"
    )


def test_a_weight_beyond_the_range_of_fp16_is_named() -> None:
    model = Mlp()
    with torch.no_grad():
        model.up.weight[2, 3] = 1e5
    graph = capture_module(model, x)
    QuantizeBase(select=ALL).run(graph)
    graph.verify()
    with pytest.raises(QcError) as caught:
        apply(Dequantize(dtype="fp16"), graph)
    assert str(caught.value) == (
        "up.weight holds 100000, and the largest f16 number is 65504\n"
        "  site   up.weight/dequantize\n"
        "  fix    use bf16, which has the range of fp32, or leave this tensor out"
    )
