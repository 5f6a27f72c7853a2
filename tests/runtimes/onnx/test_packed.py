"""Packed weights: what lies in the file, and that ONNX Runtime computes with it what the graph computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from transformers import AutoModelForCausalLM, Qwen3Config

from graph import capture
from passes.freeze_ternary import FreezeTernary
from passes.quantize_base import QuantizeBase
from passes.runner import apply
from passes.ternary_ste import TernarySte
from runtimes.export.onnx import check
from runtimes.verify.onnx_file import weights_size
from tests.runtimes.ane.models import quantized, random
from tests.runtimes.onnx.running import difference, written

ODD: dict[str, Any] = {
    "hidden_size": 36, "num_hidden_layers": 1, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 12,
    "intermediate_size": 78, "vocab_size": 101,
}  # fmt: skip
"""Sizes that are multiples of little."""


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("int8", {}), ("int4", {"block": 16}), ("nf4", {"block": 32}), ("nf4", {"block": 32, "double_quant": True}),
        ("fp8", {}), ("fp8", {"share": "weight"}), ("mxfp8", {}), ("mxfp4", {}), ("nvfp4", {}),
        ("lut", {"rank": 2, "group": 8}), ("lut", {"bits": 2, "rank": 2, "group": 8}),
        ("lut", {"bits": 3, "scale": "group", "group": 16}), ("lut", {"bits": 6, "rank": 1, "group": 8}),
        ("lut", {"bits": 4, "vector": 2, "scale": "channel"}),
        ("lut", {"bits": 3, "vector": 4, "scale": "none", "train": "none"}),
    ],
)  # fmt: skip
def test_packed_weights_compute_what_their_graph_does(scheme: str, options: dict[str, Any], tmp_path: Path) -> None:
    graph = quantized(random("qwen3"), scheme, **options)
    assert difference(graph, written(graph, tmp_path / "out")) < 5e-6


@pytest.mark.parametrize("packing", ["2bit", "trit5"])
@pytest.mark.parametrize(
    "shared", [{"granularity": "channel"}, {"granularity": "group", "group": 16}, {"granularity": "tensor"}]
)
def test_ternary_weights_are_integers_of_two_bits(packing: Any, shared: dict[str, Any], tmp_path: Path) -> None:
    graph = random("qwen3")
    apply(TernarySte(**shared), graph, check=False)
    apply(FreezeTernary(packing=packing), graph, check=False)
    folder = written(graph, tmp_path / "out")
    assert difference(graph, folder) < 5e-6
    held = {tensor.name: tensor for tensor in onnx.load(str(folder / "model.onnx")).graph.initializer}
    codes = held["model.layers.0.mlp.up_proj.weight.codes"]
    assert (codes.data_type, len(codes.raw_data)) == (onnx.TensorProto.INT2, 512)


def test_two_bits_are_four_where_onnx_runtime_would_multiply_wrongly(tmp_path: Path) -> None:
    graph = capture(AutoModelForCausalLM.from_config(Qwen3Config(**ODD)).eval())
    apply(TernarySte(), graph, check=False)
    apply(FreezeTernary(), graph, check=False)
    folder = written(graph, tmp_path / "out")
    assert difference(graph, folder) < 5e-6
    held = {tensor.name: tensor.data_type for tensor in onnx.load(str(folder / "model.onnx")).graph.initializer}
    assert held["model.layers.0.mlp.up_proj.weight.codes"] == onnx.TensorProto.INT4  # 78 outputs
    assert held["model.layers.0.mlp.down_proj.weight.codes"] == onnx.TensorProto.INT2  # 36 outputs
    assert weights_size(folder, graph, 4)[0].passed


def test_a_weight_that_is_unpacked_in_what_onnx_runtime_has_not_is_named() -> None:
    graph = random("qwen3")
    apply(QuantizeBase(scheme="nf4", block=32, compute_dtype="bf16"), graph, check=False)
    assert str(check(graph)[0]) == (
        "model.layers.0.self_attn.q_proj.weight is unpacked in bfloat16, in which ONNX Runtime does not compute\n"
        "  site   model.layers.0.self_attn.q_proj.weight/dequantize\n"
        "  fix    pack it with compute_dtype model, fp32 or fp16"
    )


def test_int4_lies_in_half_bytes_and_is_never_unpacked(tmp_path: Path) -> None:
    graph = quantized(random("qwen3"), "int4", block=16)
    model = onnx.load(str(written(graph, tmp_path / "out") / "model.onnx"))
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    codes = tensors["model.layers.0.mlp.up_proj.weight.codes"]
    assert (codes.data_type, list(codes.dims), len(codes.raw_data)) == (onnx.TensorProto.INT4, [32, 64], 1024)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("DequantizeLinear") == 14
    assert kinds.count("Transpose") == 11  # 5 of heads in each block, and the tied weight of the head


def test_a_weight_that_head_and_embedding_share_is_in_the_file_once(tmp_path: Path) -> None:
    model = onnx.load(str(written(random("qwen3"), tmp_path / "out") / "model.onnx"))
    assert [t.name for t in model.graph.initializer if "embed" in t.name] == ["model.embed_tokens.weight"]


def test_half_precision_is_near_the_graph_in_fp32(tmp_path: Path) -> None:
    for number, graph in enumerate((random("qwen3"), quantized(random("qwen3"), "int8"))):
        assert 1e-5 < difference(graph, written(graph, tmp_path / f"{number}", dtype="fp16")) < 5e-3
