from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from graph import Graph, QcError, QcErrors, Selector, capture, capture_module
from graph.formats import Scaled, format_of, packed_sites
from passes.quantize_base import QuantizeBase
from passes.runner import apply
from tests.rewrites import assert_rewrites


class Mlp(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.up = nn.Linear(width, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x).relu()


def qwen() -> Graph:
    return capture(
        Qwen3ForCausalLM(
            Qwen3Config(
                hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                intermediate_size=128, vocab_size=100, tie_word_embeddings=True,
            )
        ).eval()
    )  # fmt: skip


def test_a_selected_linear_reads_codes_times_scales() -> None:
    assert_rewrites(
        QuantizeBase(select=Selector(name="up"), scheme="nvfp4"),
        Mlp(),
        torch.randn(3, 32),
        before="""
            x: f32[3, 32]
            up = linear(x, up.weight: f32[64, 32]) : f32[3, 64]
            relu = relu(up) : f32[3, 64]
            return relu
        """,
        after="""
            x: f32[3, 32]
            up.weight/dequantize = qc.dequantize_scaled(up.weight.indices: u8[64, 16], up.weight.scale: u8[64, 2], nvfp4, model, global_scale=up.weight.global_scale: f32[1]) : f32[64, 32]
            up = linear(x, up.weight/dequantize) : f32[3, 64]
            relu = relu(up) : f32[3, 64]
            return relu
        """,
    )


@pytest.mark.parametrize(
    ("options", "scale", "name"),
    [
        ({"scheme": "fp8"}, [64, 1], "fp8, one scale a row"),
        ({"scheme": "fp8", "share": "weight"}, [1, 1], "fp8, one scale a weight"),
        ({"scheme": "mxfp8"}, [64, 2], "mxfp8"),
        ({"scheme": "mxfp4"}, [64, 2], "mxfp4"),
        ({"scheme": "int4", "block": 32}, [64, 2], "int4, blocks of 32"),
        ({"scheme": "int8", "block": 32}, [64, 2], "int8, blocks of 32"),
    ],
)
def test_each_scheme_keeps_its_contract_and_is_found_again(options: Any, scale: list[int], name: str) -> None:
    graph, step = capture_module(Mlp(64), torch.randn(3, 64)), QuantizeBase(select=Selector(name="up"), **options)
    apply(step, graph)
    (site,) = packed_sites(graph)
    assert list(graph.shape("up.weight.scale")) == scale
    assert format_of(site).name == name
    assert apply(step, graph).changed == ()


@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_scales_in_fp16_are_those_that_codes_are_found_for(scheme: Any) -> None:
    graph = capture_module(Mlp(64), torch.randn(3, 64))
    with torch.no_grad():
        graph.tensor("up.weight")[:8] *= 1e-4  # where fp16 has few numbers
    apply(QuantizeBase(select=Selector(name="up"), scheme=scheme, block=32, scale_dtype="fp16"), graph)
    assert graph.dtype_of("up.weight.scale") is torch.float16
    (site,) = packed_sites(graph)
    form = format_of(site)
    assert isinstance(form, Scaled) and form.scale_dtype is torch.float16


def test_weights_that_servers_fuse_share_their_global_scale() -> None:
    graph = qwen()
    apply(QuantizeBase(scheme="nvfp4"), graph)
    layer = "model.layers.0."
    by_name = {n.removeprefix(layer).removesuffix("_proj.weight.global_scale"): graph.tensor(n)
               for n in graph.tensors() if n.endswith("global_scale")}  # fmt: skip
    assert len(by_name) == 7
    attention = {float(by_name[f"self_attn.{end}"]) for end in "qkv"}
    mlp = {float(by_name[f"mlp.{end}"]) for end in ("gate", "up")}
    assert len(attention) == len(mlp) == 1
    assert all(value > 0 for value in attention | mlp)


def test_the_global_scale_comes_from_the_largest_of_the_fused_weights() -> None:
    graph = qwen()
    name = "model.layers.0.self_attn.k_proj.weight"
    with torch.no_grad():
        graph.tensor(name)[3, 5] = 8.0
    apply(QuantizeBase(scheme="nvfp4"), graph)
    for end in "qkv":
        assert float(graph.tensor(f"model.layers.0.self_attn.{end}_proj.weight.global_scale")) == 448 * 6 / 8
    assert float(graph.tensor("model.layers.0.self_attn.o_proj.weight.global_scale")) > 448


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"scheme": "nvfp4", "block": 32}, "nvfp4 has scales of a fixed kind and no block\n  fix    take block out, or use nf4"),
        ({"scheme": "int4", "double_quant": True}, "int4 has one scale a block and no double_quant\n  fix    take double_quant out, or use nf4"),
        ({"scheme": "mxfp4", "share": "block"}, "share is given, and scheme is mxfp4\n  fix    set scheme to fp8, or take share out"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together_are_errors(options: Any, text: str) -> None:
    with pytest.raises(QcError) as caught:
        apply(QuantizeBase(select=Selector(name="up"), **options), capture_module(Mlp(64), torch.randn(3, 64)))
    assert str(caught.value) == text


def test_a_weight_that_blocks_do_not_divide_is_an_error() -> None:
    with pytest.raises((QcError, QcErrors)) as caught:
        apply(
            QuantizeBase(select=Selector(name="up"), scheme="fp8", share="block"),
            capture_module(Mlp(), torch.randn(3, 32)),
        )
    assert str(caught.value) == (
        "fp8, blocks of 128x128: 128 does not divide the 32 input columns of up.weight\n"
        "  site   up\n  fix    exclude it from select, or take another block"
    )
