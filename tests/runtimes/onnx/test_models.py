"""What ONNX Runtime computes is what the graph computes: architectures, packed weights, the past, packed documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from graph import Graph, capture_module
from graph.cache import Cache, insert_cache
from passes.add_lora import AddLora
from passes.runner import apply
from runtimes.export.onnx import export
from runtimes.onnx.session import Decoder, Session, Text
from tests.architectures import CAUSAL, ENCODERS, REFUSED
from tests.runtimes.ane.models import quantized, random
from tests.runtimes.onnx.running import batch, difference, written


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2", "phi", "gpt2", "bert", "modernbert", "bloom"])
def test_an_architecture_computes_what_its_graph_does_on_random_shapes(name: str, tmp_path: Path) -> None:
    graph = random(name)
    assert difference(graph, written(graph, tmp_path / "out")) < 5e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", sorted({*CAUSAL, *ENCODERS} - {*REFUSED, "t5_encoder"})
)  # of T5, AutoModel makes both halves
def test_every_architecture_that_can_be_captured_can_be_exported(name: str, tmp_path: Path) -> None:
    graph = random(name)
    assert difference(graph, written(graph, tmp_path / "out")) < 5e-6


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("int8", {}), ("int4", {"block": 16}), ("nf4", {"block": 32}), ("nf4", {"block": 32, "double_quant": True}),
        ("fp8", {}), ("fp8", {"share": "weight"}), ("mxfp8", {}), ("mxfp4", {}), ("nvfp4", {}),
        ("lut", {"rank": 2, "group": 8}), ("lut", {"bits": 2, "rank": 2, "group": 8}),
        ("lut", {"bits": 3, "scale": "group", "group": 16}), ("lut", {"bits": 6, "rank": 1, "group": 8}),
    ],
)  # fmt: skip
def test_packed_weights_compute_what_their_graph_does(scheme: str, options: dict[str, Any], tmp_path: Path) -> None:
    graph = quantized(random("qwen3"), scheme, **options)
    assert difference(graph, written(graph, tmp_path / "out")) < 5e-6


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


def test_an_adapter_beside_the_weights_is_lowered_with_them(tmp_path: Path) -> None:
    graph = random("qwen3")
    apply(AddLora(rank=2), graph, check=False)
    for name in graph.tensors():
        if "lora" in name:
            graph.set_tensor(name, torch.randn(graph.shape(name)) * 0.1)
    assert difference(graph, written(graph, tmp_path / "out")) < 5e-6


def test_a_row_of_several_documents_is_read_as_the_graph_reads_it(tmp_path: Path) -> None:
    graph = random("qwen3")
    given = batch(2, 23, 99)
    given["attention_mask"][:, 9:] = 2
    given["attention_mask"][0, 15:] = 3
    with torch.no_grad():
        wanted = graph(**given)
    found = Session(written(graph, tmp_path / "out"), threads=1).run(given)["logits"]
    torch.testing.assert_close(found, wanted, atol=5e-6, rtol=0)


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gemma2"])
def test_a_text_read_in_pieces_over_its_past_gives_what_the_whole_gives(name: str, tmp_path: Path) -> None:
    graph = random(name)
    decoder = Decoder(written(graph, tmp_path / "out", kv=True))
    ids = [int(token) for token in batch(1, 19, 99)["input_ids"][0]]
    text = Text(decoder.session)
    found = torch.cat([text.every(ids[:7]), text.every(ids[7:8]), text.every(ids[8:])])
    with torch.no_grad():
        wanted = graph(input_ids=torch.tensor([ids]))[0]
    torch.testing.assert_close(found, wanted, atol=5e-6, rtol=0)


def test_the_past_holds_what_the_cache_of_the_graph_holds(tmp_path: Path) -> None:
    graph = random("qwen3")
    given = batch(2, 9, 99, padded=3)
    found = Session(written(graph, tmp_path / "out", kv=True), threads=1).run(given)
    cached = graph.copy()
    insert_cache(cached)
    cache = Cache(cached, 2, 9)
    with torch.no_grad():
        cache.run(**given)
    assert [name for name in found if name != "logits"] == [
        "present.0.key", "present.0.value", "present.1.key", "present.1.value"
    ]  # fmt: skip
    for i in range(2):
        for what in ("key", "value"):
            torch.testing.assert_close(
                found[f"present.{i}.{what}"], cache.buffers[f"past_{what}_{i}"], atol=1e-6, rtol=0
            )


def test_half_precision_is_near_the_graph_in_fp32(tmp_path: Path) -> None:
    for number, graph in enumerate((random("qwen3"), quantized(random("qwen3"), "int8"))):
        assert 1e-5 < difference(graph, written(graph, tmp_path / f"{number}", dtype="fp16")) < 5e-3


class _Pointwise(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.softplus(x, beta=2.0) + torch.nn.functional.elu(x) - torch.clamp(x, -0.5, 0.25)
        y = y * torch.rsqrt(x * x + 1) + torch.nn.functional.leaky_relu(x, 0.1) - 3 * x.abs() ** 1.5
        y = torch.where(x > 0, y, -y).masked_fill(x < -1, 0.5)
        i = torch.arange(x.shape[1])
        steps = torch.remainder(i, 3) + torch.div(i - 5, 2, rounding_mode="floor")
        y = y + steps[None, :, None]
        return torch.stack(y.chunk(2, dim=-1), dim=0).amax(0).cumsum(1).repeat_interleave(2, dim=-1)


def test_ops_on_numbers_shapes_and_axes_compute_what_torch_computes(tmp_path: Path) -> None:
    x = torch.randn(3, 7, 8)
    graph: Graph = capture_module(_Pointwise(), x)
    found = Session(export(graph, tmp_path / "out", dtype="fp32").folder, threads=1).run({graph.inputs[0]: x})
    torch.testing.assert_close(found["output"], _Pointwise()(x), atol=1e-5, rtol=1e-5)
