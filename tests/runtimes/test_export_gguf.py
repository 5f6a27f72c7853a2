"""A GGUF file of ternary weights: its bytes, and what transformers makes of it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graph import Graph, QcError, capture
from graph.formats import dense_value, packed_sites, weight_name
from passes.freeze_ternary import FreezeTernary
from passes.runner import apply
from passes.ternary_ste import TernarySte
from runtimes.export._gguf_blocks import tq1_0, tq2_0
from runtimes.export.gguf import FILE, export
from runtimes.verify import verify
from tests.runtimes.test_verify import same_process

__all__ = ["same_process"]

gguf = pytest.importorskip("gguf")


@cache
def captured(kind: str) -> Graph:
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

    torch.manual_seed(0)
    common: dict[str, Any] = {
        "hidden_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 512, "vocab_size": 64,
    }  # fmt: skip
    config = (
        Qwen3Config(head_dim=128, tie_word_embeddings=True, **common)
        if kind == "qwen3"
        else LlamaConfig(tie_word_embeddings=False, **common)
    )
    return capture(AutoModelForCausalLM.from_config(config).eval())


def frozen(kind: str = "qwen3", packing: Any = "2bit", **options: Any) -> Graph:
    graph = captured(kind).copy()
    apply(TernarySte(**options), graph, check=False)
    apply(FreezeTernary(packing=packing), graph, check=False)
    return graph


@pytest.mark.parametrize(("encode", "name", "size"), [(tq2_0, "TQ2_0", 66), (tq1_0, "TQ1_0", 54)])
def test_the_bytes_are_those_that_the_package_itself_unpacks(encode: Any, name: str, size: int) -> None:
    generator = np.random.default_rng(0)
    trits = generator.integers(0, 3, (5, 768), dtype=np.uint8)
    scales = generator.random((5, 3)).astype(np.float16)
    packed = encode(trits, scales)
    assert packed.shape == (5, 3 * size)
    kind = getattr(gguf.GGMLQuantizationType, name)
    wanted = (trits.astype(np.float32) - 1) * np.repeat(scales.astype(np.float32), 256, axis=1)
    assert np.array_equal(gguf.quants.dequantize(packed, kind), wanted)
    full = np.where(wanted == 0, 0, np.sign(wanted)).astype(np.float32)  # a scale of 1, which the package finds too
    ones = np.ones((5, 3), np.float16)
    assert np.array_equal(encode(trits, ones), gguf.quants.quantize(full, kind))


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize(
    ("kind", "packing", "options"),
    [
        ("qwen3", "2bit", {}),
        ("llama", "trit5", {"granularity": "group", "group": 256, "scale": "least-squares"}),
        ("qwen3", "trit5", {"granularity": "tensor"}),
    ],
)
def test_transformers_reads_it_and_computes_what_the_graph_does(
    tmp_path: Path, kind: str, packing: str, options: dict[str, Any]
) -> None:
    graph = frozen(kind, packing, **options)
    report = export(graph, tmp_path / "out")
    assert report.figures["ternary"] == 7
    reader = gguf.GGUFReader(tmp_path / "out" / FILE)
    encodings = {tensor.tensor_type.name for tensor in reader.tensors}
    assert encodings == {"F16", "F32", {"2bit": "TQ2_0", "trit5": "TQ1_0"}[packing]}
    found = verify(tmp_path / "out", graph)
    assert found.passed, found.table()
    site = next(s for s in packed_sites(graph) if weight_name(s).endswith("down_proj.weight"))
    tensor = next(t for t in reader.tensors if t.name == "blk.0.ffn_down.weight")
    unpacked = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    assert unpacked.reshape(256, 512).equal(dense_value(graph, site, torch.float32))


def test_what_gguf_cannot_hold_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(QcError) as caught:
        export(frozen(granularity="group", group=64), tmp_path / "out")
    assert str(caught.value).startswith(
        "model.layers.0.self_attn.q_proj.weight has a scale for every 64 columns, and GGUF one for every 256\n"
        "  site   model.layers.0.self_attn.q_proj.weight/dequantize\n"
        "  fix    set granularity to channel, or group to 256, in ternary-ste"
    )
    with pytest.raises(QcError) as caught:
        export(frozen(), tmp_path / "out", dtype="fp32")
    assert str(caught.value) == "a GGUF file keeps floats in fp16, not fp32\n  fix    set dtype to fp16"
    assert not (tmp_path / "out").exists()
