"""Graphs that are packed already, whole or in part, and what the files of an export hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from graph.weights import read_header
from passes.freeze_q import FreezeQ
from passes.quantize_base import QuantizeBase
from passes.quantize_inputs import QuantizeInputs
from passes.runner import apply
from runtimes.export import default_dtype, obstacles
from runtimes.serving.config import patterns
from runtimes.verify import verify
from tests.runtimes.serving.models import Case, exported, graph, same_process

__all__ = ["same_process"]


def stored(folder: Path) -> dict[str, Any]:
    return {name: s for path in folder.glob("*.safetensors") for name, s in read_header(path).items()}


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize(
    ("options", "target", "names"),
    [
        ({"scheme": "fp8"}, "fp8", ["weight", "weight_scale"]),
        ({"scheme": "fp8", "share": "block"}, "fp8", ["weight", "weight_scale"]),
        ({"scheme": "nvfp4"}, "nvfp4", ["input_global_scale", "weight_global_scale", "weight_packed", "weight_scale"]),
        ({"scheme": "mxfp4"}, "mxfp4", ["weight_packed", "weight_scale"]),
        ({"scheme": "int4", "block": 64}, "int4", ["weight_packed", "weight_scale", "weight_shape"]),
        ({"scheme": "nf4", "double_quant": True}, "nf4",
         ["weight", "weight.absmax", "weight.nested_absmax", "weight.nested_quant_map", "weight.quant_map",
          "weight.quant_state.bitsandbytes__nf4"]),
    ],
)  # fmt: skip
def test_a_packed_graph_is_written_as_it_is(options: Any, target: str, names: list[str], tmp_path: Path) -> None:
    packed = graph()
    apply(QuantizeBase(**options), packed)
    out = exported(tmp_path / "out", Case(target), packed)
    found = verify(out, packed)
    assert found.passed, found.table()
    assert found.figures()["max_difference"] == 0.0
    module = "model.layers.1.mlp.up_proj."
    header = stored(out)
    assert sorted(name.removeprefix(module) for name in header if name.startswith(module)) == names
    codes = header[module + names[-2 if target in ("fp8", "nvfp4", "mxfp4") else 0]]
    assert codes.load().view(torch.uint8).flatten().equal(packed.tensor(module + "weight.indices").flatten())


@pytest.mark.parametrize("double", [False, True])
def test_bitsandbytes_is_told_what_is_packed(double: bool, tmp_path: Path) -> None:
    packed = graph()
    apply(QuantizeBase(scheme="nf4", double_quant=double), packed)
    out = exported(tmp_path / "out", Case("nf4"), packed)
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    wanted = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double, "bnb_4bit_compute_dtype": "float16", "llm_int8_skip_modules": ["lm_head"],
    }  # fmt: skip
    assert {key: said[key] for key in wanted} == wanted


@pytest.mark.usefixtures("same_process")
def test_of_a_graph_packed_in_part_the_rest_stays_as_it_is(tmp_path: Path) -> None:
    from graph import Selector

    packed = graph()
    apply(QuantizeBase(select=Selector(role="mlp.*"), scheme="fp8"), packed)
    out = exported(tmp_path / "out", Case("fp8"), packed)
    found = verify(out, packed)
    assert found.passed, found.table()
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    assert said["config_groups"]["group_0"]["targets"] == [
        r"re:^model\.layers\.(0|1)\.mlp\.gate_proj$", r"re:^model\.layers\.(0|1)\.mlp\.up_proj$",
        r"re:^model\.layers\.(0|1)\.mlp\.down_proj$",
    ]  # fmt: skip
    assert said["ignore"][-1] == "lm_head"
    assert "model.layers.0.self_attn.q_proj" in said["ignore"]


@pytest.mark.usefixtures("same_process")
def test_a_group_may_be_a_whole_row(tmp_path: Path) -> None:
    from graph import Selector

    packed = graph()
    apply(QuantizeBase(select=Selector(role="mlp.down"), scheme="int4", block=256), packed, check=False)
    out = exported(tmp_path / "out", Case("int4"), packed)
    assert stored(out)["model.layers.1.mlp.down_proj.weight_scale"].shape == (128, 1)
    found = verify(out, packed)
    assert found.passed, found.table()
    assert found.figures()["max_difference"] == 0.0


def test_names_of_linears_become_one_pattern_where_only_the_block_differs() -> None:
    assert patterns(["model.layers.0.a", "model.layers.11.a", "model.layers.3.b", "head"]) == [
        r"re:^model\.layers\.(0|11)\.a$", r"re:^model\.layers\.3\.b$", "re:^head$",
    ]  # fmt: skip


def test_weights_that_servers_fuse_share_their_global_scale(tmp_path: Path) -> None:
    header = stored(exported(tmp_path / "out", Case("nvfp4", {"weight_only": True})))
    for block in range(2):
        for fused in (("self_attn", "q", "k", "v"), ("mlp", "gate", "up")):
            names = [f"model.layers.{block}.{fused[0]}.{end}_proj.weight_global_scale" for end in fused[1:]]
            assert len({float(header[name].load()) for name in names}) == 1


@pytest.mark.parametrize("scheme", ["tensor", "static"])
def test_weights_that_servers_fuse_share_the_scale_of_a_whole_weight(scheme: str, tmp_path: Path) -> None:
    """vLLM, SGLang and TensorRT-LLM take the largest scale for all of them, and round again what had another."""
    plain = graph()
    header = stored(exported(tmp_path / "out", Case("fp8", {"scheme": scheme})))
    for block in range(2):
        for fused in (("self_attn", "q", "k", "v"), ("mlp", "gate", "up")):
            names = [f"model.layers.{block}.{fused[0]}.{end}_proj.weight" for end in fused[1:]]
            largest = max(float(plain.tensor(name).detach().abs().max()) for name in names)
            (scale,) = {float(header[f"{name}_scale"].load()) for name in names}
            assert scale == pytest.approx(largest / 448, rel=2**-8)
    ends = {float(header[f"model.layers.0.{end}.weight_scale"].load()) for end in ("self_attn.o_proj", "mlp.down_proj")}
    assert len(ends) == 2, "what is multiplied alone has its own"


@pytest.mark.usefixtures("same_process")
def test_trained_weights_that_servers_fuse_share_the_scale_of_a_whole_weight(tmp_path: Path) -> None:
    trained = graph()
    apply(QuantizeBase(scheme="fp8", share="weight", scale_dtype="bf16", form="latent"), trained, check=False)
    ids = torch.arange(24)[None]
    with torch.no_grad():
        before = trained(input_ids=ids, attention_mask=torch.ones_like(ids))
    apply(FreezeQ(), trained)
    with torch.no_grad():
        assert torch.equal(trained(input_ids=ids, attention_mask=torch.ones_like(ids)), before)
    out = exported(tmp_path / "out", Case("fp8", {"weight_only": True}), trained)
    names = [f"model.layers.1.self_attn.{end}_proj.weight_scale" for end in "qkv"]
    assert len({float(stored(out)[name].load()) for name in names}) == 1
    assert verify(out, trained).figures()["max_difference"] == 0.0


def test_scales_are_rounded_to_the_dtype_of_the_rest_before_codes_are_found(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight_scale"
    for dtype, wanted in (("bf16", torch.bfloat16), ("fp32", torch.float32), ("fp16", torch.float16)):
        assert stored(exported(tmp_path / dtype, Case("fp8", {}, dtype)))[name].dtype is wanted


def test_inputs_that_one_value_feeds_have_one_scale_and_it_is_their_range(tmp_path: Path) -> None:
    out = exported(tmp_path / "out", Case("fp8", {"scheme": "static"}))
    header, seen = stored(out), json.loads((out / "qc-export.json").read_text())["inputs"]
    scales = {end: float(header[f"model.layers.1.self_attn.{end}_proj.input_scale"].load()) for end in "qkvo"}
    assert scales["q"] == scales["k"] == scales["v"] != scales["o"]
    assert scales["q"] == pytest.approx(seen["model.layers.1.self_attn.q_proj"] / 448)


def text(data: Any, tokens: int, length: int, batch: int) -> Any:
    ids = torch.randint(0, 200, (4, 24), generator=torch.Generator().manual_seed(3))
    yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize(
    ("scheme", "inputs", "options"),
    [
        ("fp8", {"scheme": "fp8"}, {}),
        ("mxfp4", {"scheme": "mxfp4"}, {}),
        ("nvfp4", {"scheme": "nvfp4", "data": "some"}, {}),
    ],
)
def test_inputs_that_trained_rounded_are_served_as_they_were(
    scheme: Any, inputs: Any, options: Any, tmp_path: Path
) -> None:
    trained = graph()
    apply(QuantizeBase(scheme=scheme, form="latent"), trained, check=False)
    apply(QuantizeInputs(**inputs).reading(text), trained, check=False)
    apply(FreezeQ(), trained, check=False)
    out = exported(tmp_path / "out", Case(scheme, options), trained)
    found = verify(out, trained)
    assert found.passed, found.table()
    assert found.figures()["max_difference"] == 0.0
    seen = trained.sites("qc.fake_quantize_input")[0].node.kwargs.get("seen")
    said = json.loads((out / "qc-export.json").read_text())["inputs"]
    assert said.get("model.layers.0.self_attn.q_proj") == seen, "what was trained with, not what is found again"


@pytest.mark.parametrize(
    ("target", "options", "text"),
    [
        ("fp8", {"weight_only": True},
         "model.layers.0.self_attn.q_proj reads what is rounded to fp8, and the export lets it read its input as it is"),
        ("int8", {}, "model.layers.0.self_attn.q_proj reads what is rounded to fp8, and the export lets it read its input in int8"),
        ("fp8", {"scheme": "block"}, "model.layers.0.self_attn.q_proj reads what is rounded to fp8, and the export lets it read its "
         "input in fp8, scaled in another way"),
        ("safetensors", {}, "inputs are rounded to fp8 at 8 sites, which safetensors has no form of"),
        ("onnx", {}, "inputs are rounded to fp8 at 8 sites, which onnx has no form of"),
    ],
)  # fmt: skip
def test_an_export_to_other_numbers_than_those_trained_with_is_refused(target: str, options: Any, text: str) -> None:
    trained = graph()
    apply(QuantizeInputs(), trained, check=False)
    (error,) = obstacles(target, trained, default_dtype(target), options)
    assert error.what == text
    last = "or take quantize-inputs out"
    assert error.fix in (f"export to fp8, {last}", f"export to fp8 with the options of quantize-inputs, {last}")
