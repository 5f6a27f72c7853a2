"""What each server takes, told before anything is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from graph import Graph, QcError, QcErrors, Selector
from passes.quantize_base import QuantizeBase
from recipes.load import load
from runtimes.export._serving import settings_of
from runtimes.serving.rules import load_server, refusals, servers, variant
from tests.runtimes.serving.models import CASES, Case, exported, graph


def told(server: str, target: Any, of: Graph | None = None, **options: Any) -> list[str]:
    return [str(error) for error in refusals(server, of or graph(), settings_of(target, **options))]


def packed(scheme: Any, **select: Any) -> Graph:
    made = graph()
    step = QuantizeBase(scheme=scheme)
    (replace(step, select=Selector(**select)) if select else step).run(made)
    made.verify()
    return made


def test_transformers_takes_all_that_is_verified_through_it() -> None:
    known = set(load_server("transformers").accepts)
    written = {variant(settings_of(case.target, **case.options)) for case in CASES}  # type: ignore[arg-type]
    assert {one for one in written if not one.startswith("modelopt:")} <= known


@pytest.mark.parametrize("server", servers())
def test_every_variant_that_a_server_takes_can_be_asked_for(server: str) -> None:
    for one in load_server(server).accepts:
        dialect, _, rest = one.rpartition(":")
        target, *words = rest.split("-")
        scheme = words[0] if target == "fp8" else None
        weight_only = words[-2:] == ["weight", "only"]
        group = 128 if words == ["groups"] else None
        settings = settings_of(target, scheme=scheme, weight_only=weight_only, dialect=dialect or None, group=group)  # type: ignore[arg-type]
        assert not list(settings.mistakes()), one
        assert variant(settings) == one


LOADED = {
    "fp8-channel": "transformers vllm sglang tensorrt-llm",
    "fp8-tensor": "transformers vllm sglang",
    "fp8-block": "transformers vllm sglang tensorrt-llm",
    "nvfp4": "transformers vllm sglang tensorrt-llm",
    "nvfp4-weight-only": "transformers vllm sglang",
    "mxfp8": "transformers vllm",
    "int2": "transformers",
    "int4": "transformers vllm sglang",
    "int8-groups": "transformers vllm sglang",
    "modelopt:fp8-static": "vllm sglang tensorrt-llm",
    "modelopt:nvfp4": "vllm sglang tensorrt-llm",
    "modelopt:mxfp8": "vllm",
    "hf:fp8-block": "transformers vllm sglang tensorrt-llm",
    "hf:mxfp8": "transformers vllm sglang tensorrt-llm",
}
"""What was read in the servers' sources, or loaded."""


@pytest.mark.parametrize("one", LOADED)
def test_who_loads_what_is_as_their_sources_say(one: str) -> None:
    assert [server for server in servers() if one in load_server(server).accepts] == sorted(LOADED[one].split())


def sized(hidden: int) -> Graph:
    """Without values."""
    from transformers import Qwen3Config

    from graph import capture

    return capture(Qwen3Config(hidden_size=hidden, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                               head_dim=128, intermediate_size=256, vocab_size=200))  # fmt: skip


@pytest.mark.parametrize(
    ("hidden", "options", "refused"),
    [
        (136, {}, "sglang tensorrt-llm vllm"),
        (144, {}, ""),
        (144, {"target": "nvfp4"}, "sglang tensorrt-llm vllm"),
        (160, {"target": "nvfp4"}, ""),
        (160, {"target": "int4", "group": 32}, "sglang vllm"),
        (256, {"target": "int4"}, ""),
        (136, {"target": "int8"}, "sglang vllm"),
    ],
)
def test_sizes_that_no_kernel_takes_are_told(hidden: int, options: dict[str, Any], refused: str) -> None:
    target, rest = options.get("target", "fp8"), {key: value for key, value in options.items() if key != "target"}
    made = sized(hidden)
    asked = {server: told(server, target, made, **rest) for server in servers()}
    divided = [server for server, said in asked.items() if any(" divides the " in text for text in said)]
    assert divided == refused.split()


def test_what_every_server_takes_is_the_default() -> None:
    for server in servers():
        assert told(server, "fp8") == told(server, "nvfp4") == [], server


@pytest.mark.parametrize(
    ("server", "target", "options", "text"),
    [
        ("tensorrt-llm", "fp8", {"scheme": "tensor"}, "TensorRT-LLM does not load fp8-tensor\n  fix    export one of fp8-channel, fp8-block, hf:fp8-block, modelopt:fp8-channel, modelopt:fp8-static, modelopt:fp8-block"),
        ("tensorrt-llm", "nvfp4", {"weight_only": True}, "TensorRT-LLM does not load nvfp4-weight-only\n  fix    export one of nvfp4, modelopt:nvfp4, modelopt:nvfp4-weight-only"),
        ("tensorrt-llm", "int4", {}, "TensorRT-LLM does not load int4\n  fix    export one of fp8, nvfp4"),
        ("transformers", "nvfp4", {"dialect": "modelopt"}, "transformers does not load modelopt:nvfp4\n  fix    export one of nvfp4, nvfp4-weight-only"),
        ("sglang", "mxfp8", {}, "SGLang does not load mxfp8\n  fix    export one of hf:mxfp8"),
    ],
)  # fmt: skip
def test_what_a_server_does_not_load_is_told_with_what_it_does(
    server: str, target: str, options: Any, text: str
) -> None:
    assert told(server, target, **options) == [text]


def test_weights_that_are_multiplied_as_one_are_packed_together() -> None:
    some = packed("fp8", role=("attn.q", "attn.v", "mlp.*"), block=0)
    names = "model.layers.0.self_attn."
    assert told("vllm", "fp8", some) == [
        f"vLLM multiplies {names}q_proj, {names}k_proj, {names}v_proj as one, and {names}k_proj is not packed\n"
        f"  site   {names}q_proj\n  fix    pack all of them, or none"
    ]
    assert told("transformers", "fp8", some) == []


def test_weights_have_the_sizes_that_kernels_divide_by(monkeypatch: pytest.MonkeyPatch) -> None:
    from runtimes.serving import rules

    server = load_server("vllm")
    narrow = rules.Server(**{**vars(server), "multiples": {"fp8": {"rows": 192}}})
    monkeypatch.setattr(rules, "load_server", lambda _: narrow)
    assert told("vllm", "fp8")[0] == (
        "vLLM divides the rows of fp8 weights by 192, and model.layers.0.self_attn.q_proj.weight has 256\n"
        "  site   model.layers.0.self_attn.q_proj\n  fix    exclude it from the select of quantize-base"
    )


def test_groups_have_the_sizes_that_kernels_know() -> None:
    made = graph()
    QuantizeBase(scheme="int4", block=256, select=Selector(role="mlp.down")).run(made)
    made.verify()
    assert (
        told("vllm", "int4", made)[0]
        == told("sglang", "int4", made)[0].replace("SGLang", "vLLM")
        == (
            "vLLM reads int4 in groups of 32, 64 or 128, and model.layers.0.mlp.down_proj.weight has groups of 256\n"
            "  site   model.layers.0.mlp.down_proj\n  fix    set block to 128 in quantize-base"
        )
    )
    assert told("transformers", "int4", made) == []
    assert told("vllm", "int4", group=32) == []


def test_an_embedding_that_is_packed_is_refused(tmp_path: Path) -> None:
    with pytest.raises((QcError, QcErrors)) as caught:
        exported(tmp_path / "out", Case("fp8"), packed("fp8", role=("embed", "mlp.*")))
    assert str(caught.value) == (
        "model.embed_tokens.weight is packed, and aten.embedding and aten.linear reads it: servers read floats\n"
        "  site   model.embed_tokens.weight/dequantize\n"
        "  fix    exclude embed and head from the select of quantize-base"
    )


def test_global_scales_that_fused_weights_do_not_share_are_refused(tmp_path: Path) -> None:
    apart = packed("nvfp4", role="attn.k")
    QuantizeBase(scheme="nvfp4").run(apart)
    apart.verify()
    with pytest.raises((QcError, QcErrors)) as caught:
        exported(tmp_path / "out", Case("nvfp4"), apart)
    assert "self_attn.v_proj.weight have global scales of their own, and servers multiply them as one" in str(
        caught.value
    )
    assert not list(tmp_path.iterdir())


def test_an_unknown_server_has_a_suggestion() -> None:
    with pytest.raises(QcError) as caught:
        load_server("vlm")
    assert str(caught.value) == "no server is called 'vlm'\n  fix    did you mean vllm?"


def test_the_check_of_a_recipe_holds_its_exports_against_a_server(tmp_path: Path) -> None:
    from qc.compiling import plan

    for text, said in (
        ("export: [{target: fp8}, {target: nvfp4}]", []),
        ("export: [{target: int4}]", ["TensorRT-LLM does not load int4"]),
        ("export: [{target: ane, context: 256}]", ["the recipe exports nothing that TensorRT-LLM loads"]),
    ):
        (tmp_path / "recipe.yaml").write_text(f"model: seedling\n{text}\n")
        errors = plan(load(str(tmp_path / "recipe.yaml")), server="tensorrt-llm")[1]
        assert [error.what for error in errors] == said
