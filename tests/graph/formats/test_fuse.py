from contextlib import nullcontext
from textwrap import dedent
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from graph import Graph, Selector, capture, capture_module
from graph.formats import FourBit, dense_value, fuse_dequantize, make_format, packed_sites, store_packed
from graph.formats.fuse import unnest_scales
from passes.quantize_base import QuantizeBase

FUSED = """
        x: f32[2, 5, 64]
        up = qc.linear_4bit(x, up.weight.indices: u8[128, 32], up.weight.absmax: u8[128, 1], nf4, model, absmax_scale=up.weight.absmax_scale: f32[1], absmax_offset=up.weight.absmax_offset: f32[], bias=up.bias: f32[128]) : f32[2, 5, 128]
        relu = relu(up) : f32[2, 5, 128]
        down = qc.linear_4bit(relu, down.weight.indices: u8[64, 64], down.weight.absmax: u8[64, 2], nf4, model, absmax_scale=down.weight.absmax_scale: f32[1], absmax_offset=down.weight.absmax_offset: f32[]) : f32[2, 5, 64]
        add = add.Tensor(x, down) : f32[2, 5, 64]
        return add
"""

SCHEMES = [
    ("nf4", False),
    ("nf4", True),
    ("fp4", True),
    ("int8", False),
    ("fp8", False),
    ("nvfp4", False),
    ("int4", False),
]


class Mlp(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


def packed_mlp(scheme: Any = "nf4", double_quant: bool = False, width: int = 64) -> tuple[Graph, Tensor]:
    x = torch.randn(2, 5, width, requires_grad=True)
    graph = capture_module(Mlp(width), x)
    for name in ("up.weight", "down.weight"):
        form = make_format(scheme, double_quant=double_quant)
        store_packed(graph, name, form, form.pack(graph.tensor(name).detach()))
    graph.verify()
    return graph, x


def gradients(graph: Graph, x: Tensor) -> list[Tensor]:
    y = graph(x)
    inputs = [x, graph.tensor("up.bias")]
    return [y, *torch.autograd.grad(y, inputs, torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))]


def test_scales_in_8_bits_are_stored_in_fp32_for_training_and_give_the_same_bits() -> None:
    graph, x = packed_mlp(double_quant=True)
    fused = graph.copy()
    fuse_dequantize(fused)
    wanted = gradients(fused, x)
    assert unnest_scales(fused) == 2
    assert "absmax_scale" not in str(fused)
    assert fused.dtype_of("up.weight.absmax") == torch.float32
    assert graph.dtype_of("up.weight.absmax") == torch.uint8, "the graph itself keeps what it stores"
    assert all(torch.equal(a, b) for a, b in zip(gradients(fused, x), wanted, strict=True))
    assert unnest_scales(fused) == 0


def test_each_linear_takes_in_the_op_that_unpacks_its_weight() -> None:
    graph, _ = packed_mlp(double_quant=True)
    fused = graph.copy()
    assert fuse_dequantize(fused) == 2
    assert str(fused) == dedent(FUSED).strip()
    assert "qc.dequantize_4bit" in str(graph)
    assert fuse_dequantize(fused) == 0


@pytest.mark.parametrize(("scheme", "double_quant"), SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_two_ops_and_of_a_float_weight(
    scheme: str, double_quant: bool, dtype: torch.dtype
) -> None:
    graph, x = packed_mlp(scheme, double_quant)
    x = x.detach().to(dtype).requires_grad_()
    graph.to(dtype)
    fused = graph.copy()
    fuse_dequantize(fused)
    separate = gradients(graph, x)
    assert all(a.equal(b) for a, b in zip(gradients(fused, x), separate, strict=True))
    with torch.no_grad():
        assert fused(x).equal(separate[0])
    plain = Mlp().to(dtype)
    up, down = (dense_value(graph, site) for site in packed_sites(graph))
    plain.load_state_dict({"up.weight": up, "up.bias": graph.tensor("up.bias"), "down.weight": down})
    y = plain(x)
    upstream = torch.linspace(-1, 1, y.numel(), dtype=dtype).view(y.shape)
    float_weight = [y, *torch.autograd.grad(y, [x, plain.up.bias], upstream)]
    assert all(a.equal(b) for a, b in zip(float_weight, separate, strict=True))


@pytest.mark.parametrize("compute", [None, torch.bfloat16])
def test_under_autocast_too(compute: torch.dtype | None) -> None:
    x = torch.randn(2, 5, 64, requires_grad=True)
    graph = capture_module(Mlp(), x)
    for name in ("up.weight", "down.weight"):
        store_packed(graph, name, FourBit(), FourBit().pack(graph.tensor(name).detach()), compute)
    graph.verify()
    fused = graph.copy()
    assert fuse_dequantize(fused) == 2
    for context in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            assert all(a.equal(b) for a, b in zip(gradients(fused, x), gradients(graph, x), strict=True))


def test_a_fused_graph_still_changes_its_dtype() -> None:
    graph, x = packed_mlp()
    fused = graph.copy()
    fuse_dequantize(fused)
    low = x.detach().bfloat16()
    graph.to(torch.bfloat16)
    expected = graph(low)
    fused.to(torch.bfloat16)
    assert fused(low).dtype == torch.bfloat16
    assert fused(low).equal(expected)


def saved_bytes(graph: Graph, x: Tensor) -> tuple[int, int]:
    """What a forward keeps for its backward beside the graph's own tensors, and the largest single piece of it."""
    own = {graph.tensor(name).data_ptr() for name in graph.tensors()}
    kept: dict[int, int] = {}

    def note(value: Tensor) -> Tensor:
        if value.data_ptr() not in own:
            kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        y = graph(x)
    y.sum().backward()
    return sum(kept.values()), max(kept.values())


@pytest.mark.parametrize(("scheme", "double_quant"), SCHEMES)
def test_no_dense_weight_is_kept_for_the_backward(scheme: str, double_quant: bool) -> None:
    graph, x = packed_mlp(scheme, double_quant, width=512)
    fused = graph.copy()
    fuse_dequantize(fused)
    dense = 512 * 1024 * 4
    assert saved_bytes(graph, x)[0] >= 2 * dense
    total, largest = saved_bytes(fused, x)
    activations = 2 * 5 * 1024 * 4  # of relu; the packed weights are the graph's own
    assert largest <= activations
    assert total <= 2 * activations


def test_the_unpacked_view_of_tied_weights_stays_for_the_embedding() -> None:
    config = Qwen3Config(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                         intermediate_size=128, vocab_size=100, tie_word_embeddings=True)  # fmt: skip
    graph = capture(Qwen3ForCausalLM(config).eval())
    QuantizeBase(select=Selector(role="*")).run(graph)
    graph.verify()
    fused = graph.copy()
    assert fuse_dequantize(fused) == 8
    assert [site.name for site in fused.sites("qc.dequantize_4bit")] == ["model.embed_tokens.weight/dequantize"]
    ids = torch.randint(0, 100, (2, 7))
    assert fused(input_ids=ids).equal(graph(input_ids=ids))


def test_a_linear_over_a_float_weight_is_left_alone() -> None:
    graph = capture_module(Mlp(), torch.randn(3, 64))
    before = str(graph)
    assert fuse_dequantize(graph) == 0
    assert str(graph) == before
