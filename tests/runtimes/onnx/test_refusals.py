"""What cannot be exported to ONNX is named in one go, before any work."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from graph import Graph, QcError, capture, capture_module
from graph.cache import insert_cache
from passes.freeze_ternary import FreezeTernary
from passes.runner import apply
from passes.ternary_ste import TernarySte
from runtimes.export import obstacles
from runtimes.export.onnx import check, export
from runtimes.onnx import file as onnx_file
from runtimes.onnx import session as onnx_session
from tests.architectures import config
from tests.runtimes.ane.models import quantized, random


def refused(graph: Graph, **options: Any) -> str:
    return "\n\n".join(str(error) for error in check(graph, **options))


def test_all_ops_without_a_lowering_are_one_error() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.i0(x) + torch.lgamma(x) + torch.lgamma(x + 1)

    assert refused(capture_module(Model(), torch.randn(2, 3))) == (
        "onnx has no lowering for aten.lgamma (x2), aten.special_i0 (x1)\n"
        "  site   special_i0\n"
        "  fix    add one in runtimes/onnx, or rewrite the op away with an earlier pass"
    )


def test_arguments_without_a_lowering_are_named_with_their_site() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.remainder(x, 2.0)

    assert refused(capture_module(Model(), torch.randn(2, 3))) == (
        "onnx has no lowering for aten.remainder.Scalar of floats\n"
        "  site   remainder\n"
        "  fix    add one in runtimes/onnx, or rewrite the op away with an earlier pass"
    )


def test_a_weight_that_trains_through_its_packing_has_to_be_frozen_first() -> None:
    graph = quantized(random("qwen3"), "lut", rank=2, group=8, form="latent", train="weights")
    errors = refused(graph).split("\n\n")
    assert len(errors) == 14
    assert errors[0] == (
        "model.layers.0.self_attn.q_proj.weight is still a float weight that is packed anew each time it is read\n"
        "  site   model.layers.0.self_attn.q_proj.weight/fake_quantize\n"
        "  fix    run freeze-q before the export"
    )


def test_inputs_that_are_rounded_by_token_are_refused_with_the_option_that_does_so() -> None:
    graph = random("qwen3")
    apply(TernarySte(act_bits=8), graph, check=False)
    apply(FreezeTernary(), graph, check=False)
    assert refused(graph) == (
        "onnx has no lowering for qc.fake_quantize_tokens (x8)\n"
        "  site   model.layers.0.input_layernorm/int8\n"
        "  fix    take act_bits out of ternary-ste"
    )


def test_a_plan_without_weights_is_checked_and_not_written(tmp_path: Path) -> None:
    plan = capture(config("qwen3"))
    assert obstacles("onnx", plan, "fp16", {"kv": True}) == []
    with pytest.raises(QcError) as caught:
        export(plan, tmp_path / "out")
    assert str(caught.value) == "the graph has no weights\n  fix    capture a model folder, not a configuration"
    assert list(tmp_path.iterdir()) == []


def test_what_has_no_past_is_not_exported_with_one() -> None:
    assert refused(random("bert"), kv=True) == (
        "only a decoder of tokens can have a key/value cache\n"
        "  fix    this model cannot run token by token: export without kv"
    )
    cached = random("qwen3")
    insert_cache(cached)
    assert refused(cached) == (
        "the graph has a cache already\n  fix    export the graph as it is before insert-kv-cache"
    )


def test_dtypes_and_words_that_onnx_has_no_use_for_are_refused(tmp_path: Path) -> None:
    asked: Any = {"dtype": "bf16"}
    with pytest.raises(QcError) as caught:
        export(random("qwen3"), tmp_path / "out", **asked)
    assert str(caught.value) == ("ONNX Runtime computes in fp32 or fp16, not bf16\n  fix    set dtype to one of them")
    assert refused(random("qwen3"), kv="io") == (
        "kv is 'io', and the target onnx takes true or false\n  fix    set kv to true, or take it out"
    )


def test_a_scale_too_small_for_half_precision_is_named(tmp_path: Path) -> None:
    graph = quantized(random("qwen3"), "int8")
    name = "model.layers.0.mlp.up_proj.weight.scale"
    scale = graph.tensor(name).clone()
    scale[4] = 1e-7
    graph.set_tensor(name, scale)
    with pytest.raises(QcError) as caught:
        export(graph, tmp_path / "out", dtype="fp16")
    assert str(caught.value) == (
        "model.layers.0.mlp.up_proj.weight has a scale of 7.87402e-10, which float16 does not hold\n"
        "  site   model.layers.0.mlp.up_proj.weight\n"
        "  fix    export with dtype fp32"
    )


@pytest.mark.parametrize(
    ("package", "module", "what"),
    [("onnx", onnx_file.onnx, "writing ONNX models"), ("onnxruntime", onnx_session.runtime, "running ONNX models")],
)
def test_without_its_packages_the_error_says_how_to_get_them(
    package: str, module: Any, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    module.cache_clear()
    with pytest.raises(QcError) as caught:
        module()
    assert str(caught.value) == (
        f'{what} needs {package}, which is not installed\n  fix    pip install "qc-compiler[onnx]"'
    )
    module.cache_clear()


def test_a_model_that_onnx_runtime_does_not_load_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(QcError) as caught:
        onnx_session.Session(tmp_path)
    assert caught.value.what.startswith(f"ONNX Runtime does not load {tmp_path / 'model.onnx'}: [ONNXRuntimeError]")
    assert caught.value.fix == "export again"
