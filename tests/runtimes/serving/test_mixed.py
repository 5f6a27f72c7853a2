"""Several formats in one checkpoint: what a graph holds, each weight as it is, and what cannot stand side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from graph import Graph, QcError, QcErrors, Selector
from passes.freeze_ternary import FreezeTernary
from passes.quantize_base import QuantizeBase
from passes.runner import apply
from passes.ternary_ste import TernarySte
from runtimes.export import obstacles
from runtimes.export._serving import settings_of
from runtimes.serving.rules import refusals
from runtimes.verify import verify
from tests.runtimes.serving.models import Case, exported, graph, same_process

__all__ = ["same_process"]

LAYER = "model.layers.0."
Q = f"{LAYER}self_attn.q_proj.weight"


def mixed(attention: dict[str, Any], mlp: dict[str, Any]) -> Graph:
    made = graph()
    for role, options in (("attn.*", attention), ("mlp.*", mlp)):
        apply(QuantizeBase(select=Selector(role=role), **options), made, check=False)
    return made


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize(
    ("attention", "mlp", "options", "layouts"),
    [
        ({"scheme": "int8", "block": 64}, {"scheme": "int4", "block": 32}, {}, ["pack-quantized", "pack-quantized"]),
        ({"scheme": "fp8"}, {"scheme": "int4"}, {"weight_only": True}, ["float-quantized", "pack-quantized"]),
        ({"scheme": "fp8", "share": "block"}, {"scheme": "int4"}, {"kv_cache": "fp8"}, ["float-quantized", "pack-quantized"]),
        (
            {"scheme": "fp8", "scale_dtype": "bf16"}, {"scheme": "nvfp4"}, {},
            ["float-quantized", "nvfp4-pack-quantized"],
        ),
        (
            {"scheme": "int8", "block": 128, "scale_dtype": "bf16"}, {"scheme": "nvfp4"}, {"weight_only": True},
            ["pack-quantized", "nvfp4-pack-quantized"],
        ),
        ({"scheme": "mxfp8"}, {"scheme": "mxfp4"}, {}, ["mxfp8-quantized", "mxfp4-pack-quantized"]),
    ],
)  # fmt: skip
def test_transformers_computes_what_the_graph_computes(
    attention: Any, mlp: Any, options: Any, layouts: list[str], tmp_path: Path
) -> None:
    made = mixed(attention, mlp)
    out = exported(tmp_path / "out", Case("mixed", options), made)
    found = verify(out, made)
    assert found.passed, found.table()
    assert found.figures()["max_difference"] == 0.0
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    assert said["format"] == ("mixed-precision" if len(set(layouts)) > 1 else layouts[0])
    groups = said["config_groups"]
    assert [group["format"] for group in groups.values()] == layouts
    assert groups["group_0"]["targets"][0] == r"re:^model\.layers\.(0|1)\.self_attn\.q_proj$"
    assert groups["group_1"]["targets"][0] == r"re:^model\.layers\.(0|1)\.mlp\.gate_proj$"


@pytest.mark.usefixtures("same_process")
def test_ternary_weights_of_different_scales_stand_beside_integers(tmp_path: Path) -> None:
    made = graph()
    apply(TernarySte(select=Selector(role="mlp.gate")), made, check=False)
    apply(TernarySte(select=Selector(role="mlp.up")), made, check=False)
    apply(TernarySte(select=Selector(role="mlp.down"), granularity="group", group=64), made, check=False)
    apply(FreezeTernary(), made, check=False)
    apply(QuantizeBase(select=Selector(role="attn.*"), scheme="int4"), made, check=False)
    out = exported(tmp_path / "out", Case("mixed"), made)
    found = verify(out, made)
    assert found.passed, found.table()
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]
    assert sorted((g["weights"]["num_bits"], g["weights"]["strategy"]) for g in groups.values()) == [
        (2, "channel"), (2, "group"), (4, "group"),
    ]  # fmt: skip


def refused(made: Graph, tmp_path: Path, **options: Any) -> str:
    with pytest.raises((QcError, QcErrors)) as caught:
        exported(tmp_path / "out", Case("mixed", options), made)
    assert not list(tmp_path.iterdir())
    first = str(caught.value).split("\n\n")[0]
    assert str(obstacles("mixed", made, "bf16", options)[0]) == first
    return first


def test_weights_that_servers_multiply_as_one_have_one_format(tmp_path: Path) -> None:
    made = graph()
    apply(QuantizeBase(select=Selector(role=("attn.q", "attn.o", "mlp.*")), scheme="int4"), made, check=False)
    apply(QuantizeBase(select=Selector(role=("attn.k", "attn.v")), scheme="fp8"), made, check=False)
    names = ", ".join(f"{LAYER}self_attn.{end}_proj.weight" for end in "qkv")
    assert refused(made, tmp_path) == (
        f"{names} hold int4, blocks of 64 and fp8, one scale a row, and servers multiply them as one\n"
        f"  site   {LAYER}self_attn.q_proj\n  fix    select all of them in one quantize-base"
    )


def test_scales_that_would_be_rounded_beside_bf16_are_refused(tmp_path: Path) -> None:
    assert refused(mixed({"scheme": "fp8"}, {"scheme": "nvfp4"}), tmp_path) == (
        f"the scales of {Q} are float32, and beside nvfp4 they are read as bfloat16\n"
        f"  site   {LAYER}self_attn.q_proj\n  fix    set scale_dtype to bf16 in its quantize-base"
    )


def test_what_has_no_place_in_a_mixture_is_refused(tmp_path: Path) -> None:
    assert refused(mixed({"scheme": "nf4"}, {"scheme": "int4"}), tmp_path) == (
        f"{Q} holds nf4, blocks of 64, and so do 7 more, which compressed-tensors has no form of\n"
        f"  site   {Q}/dequantize\n  fix    pack it in another format, or leave it as floats"
    )
    assert refused(graph(), tmp_path) == (
        "the graph holds no packed weights, and mixed writes them in the formats that they have\n"
        "  fix    add a quantize-base for each format, or export to one of them"
    )


def test_a_mixture_of_what_bf16_alone_is_computed_beside_is_written_in_bf16(tmp_path: Path) -> None:
    made = mixed({"scheme": "mxfp8"}, {"scheme": "mxfp4"})
    (error,) = obstacles("mixed", made, "fp16", {})
    assert str(error) == "mxfp8 is computed beside bf16, not fp16\n  fix    set dtype to bf16, or take it out"


def told(server: str, made: Graph, **options: Any) -> list[str]:
    return [str(error) for error in refusals(server, made, settings_of("mixed", **options))]


def test_servers_say_what_of_a_mixture_they_load() -> None:
    made = mixed({"scheme": "fp8", "scale_dtype": "bf16"}, {"scheme": "nvfp4"})
    assert told("vllm", made) == told("tensorrt-llm", made) == told("transformers", made) == []
    assert told("sglang", made) == [
        "SGLang loads one format a checkpoint, and this is a mixture\n"
        "  fix    pack all weights in one format: fp8, nvfp4, int4, int8"
    ]
    assert told("tensorrt-llm", made, weight_only=True) == [
        "TensorRT-LLM does not load fp8-channel-weight-only\n  fix    export one of fp8-channel, fp8-block, hf:fp8-block, "
        "modelopt:fp8-channel, modelopt:fp8-static, modelopt:fp8-block",
        "TensorRT-LLM does not load nvfp4-weight-only\n"
        "  fix    export one of nvfp4, modelopt:nvfp4, modelopt:nvfp4-weight-only",
    ]


def test_scales_of_one_dtype_are_stored_as_they_were_trained(tmp_path: Path) -> None:
    from tests.runtimes.serving.test_packed import stored

    made = mixed({"scheme": "fp8", "scale_dtype": "bf16"}, {"scheme": "nvfp4"})
    header = stored(exported(tmp_path / "out", Case("mixed"), made))
    assert header[f"{LAYER}self_attn.q_proj.weight_scale"].dtype is torch.bfloat16
    assert header[f"{LAYER}mlp.up_proj.weight_scale"].dtype is torch.float8_e4m3fn
