"""What cannot be exported is named in one go, before any work."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from graph import Graph, QcError, QcErrors, capture
from graph.cache import insert_cache
from passes.add_lora import AddLora
from passes.runner import apply
from runtimes.ane import mil
from runtimes.ane.plan import Settings, plan
from runtimes.ane.profile import load_profile, profiles
from runtimes.export.ane import export
from tests.architectures import config
from tests.runtimes.ane.models import quantized, random


def refused(graph: Graph, **settings: Any) -> str:
    chosen = Settings(profile=settings.pop("profile", None) or load_profile(), **settings)
    found, errors = plan(graph, chosen)
    assert found is None
    return "\n\n".join(str(error) for error in errors)


def test_all_ops_without_a_lowering_are_one_error() -> None:
    assert refused(random("apertus"), context=32, prefill=8) == (
        "ane has no lowering for aten.expm1 (x2), aten.gt.Scalar (x2), aten.min.other (x2), aten.where.self (x2)\n"
        "  site   model.layers.0.mlp.act_fn/gt\n"
        "  fix    add one in runtimes/ane, or rewrite the op away with an earlier pass"
    )


def test_an_adapter_has_to_be_merged_first() -> None:
    graph = random("qwen3")
    apply(AddLora(rank=2), graph, check=False)
    assert refused(graph, context=32, prefill=8) == (
        "ane has no lowering for qc.lora (x14)\n"
        "  site   model.layers.0.self_attn.q_proj/lora.default\n"
        "  fix    run merge-lora before the export"
    )


def test_every_weight_that_cannot_stay_packed_is_named() -> None:
    errors = refused(quantized(random("qwen3"), "nf4", block=32), context=32, prefill=8).split("\n\n")
    assert len(errors) == 14
    assert errors[0] == (
        "model.layers.0.self_attn.q_proj.weight is nf4 with a scale every few columns, which the Neural Engine cannot keep packed\n"
        "  site   model.layers.0.self_attn.q_proj\n"
        "  fix    dequantize it before the export, or quantize it with scheme: lut or int8"
    )


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"context": 96}, "context 96 is more than the 64 positions of the model\n  fix    set context to at most 64"),
        (
            {"context": 40, "prefill": 8},
            "context 40 is no multiple of 32, which the last axes of a state must be\n  fix    set context to 64, or kv to io",
        ),
        (
            {"context": 32, "prefill": 64},
            "prefill 64 does not go with context 32\n  fix    set prefill to 2 … 32, or to 0 for none",
        ),
        (
            {"context": 32, "prefill": 8, "kv": "states"},
            "no kv mode is called 'states'\n  fix    use state_slice, state_blend, io",
        ),
        (
            {"context": 32, "prefill": 8, "chunks": 3},
            "chunks is 3, and the model has 2 blocks\n  fix    set it to 1 … 2",
        ),
    ],
)
def test_settings_that_do_not_go_with_the_model_are_errors(settings: dict[str, Any], text: str) -> None:
    assert refused(random("qwen3"), **settings) == text


def test_settings_and_weights_are_named_together() -> None:
    errors = refused(quantized(random("qwen3"), "nf4", block=32), context=40, prefill=8).split("\n\n")
    assert errors[0].startswith("context 40 is no multiple of 32")
    assert len(errors) == 15


def test_an_encoder_is_no_longer_than_its_positions() -> None:
    assert refused(random("bert"), lengths=(16, 128)) == (
        "length 128 is more than the 64 positions of the model\n  fix    set length to at most 64"
    )


def test_a_block_larger_than_the_chip_takes_is_an_error() -> None:
    profile = replace(load_profile(), part_bytes=5000)
    assert refused(random("qwen3"), context=32, prefill=8, profile=profile).splitlines()[0] == (
        "the part embed has 0.00 GB of weights, and m4-macos15 takes 0.00"
    )


def test_a_graph_with_a_cache_is_refused() -> None:
    graph = random("qwen3")
    insert_cache(graph)
    assert refused(graph, context=32, prefill=8) == (
        "the graph has a cache already\n  fix    export the graph as it is before insert-kv-cache"
    )


def test_attention_that_looks_across_tokens_elsewhere_is_refused() -> None:
    assert "this model cannot run token by token, which a decoder on the Neural Engine does" in refused(
        random("mpt"), context=32, prefill=8
    )


def test_what_is_missing_is_named_together_with_what_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(QcErrors) as caught:
        export(capture(config("qwen3")), tmp_path / "out", context=32, prefill=8, dtype="bf16")  # type: ignore[arg-type]
    assert [error.what for error in caught.value.errors] == [
        f"{tmp_path / 'out'} is already there",
        "the Neural Engine computes in fp16, not bf16",
        "the graph has no weights",
    ]


def test_an_unknown_chip_is_an_error_that_knows_the_others(tmp_path: Path) -> None:
    with pytest.raises(QcError) as caught:
        export(random("qwen3"), tmp_path / "out", chip="m4-macos16")
    assert str(caught.value) == "no chip is called 'm4-macos16'\n  fix    did you mean m4-macos15?"
    with pytest.raises(QcError) as caught:
        load_profile("cerebras")
    assert str(caught.value) == f"no chip is called 'cerebras'\n  fix    use one of {', '.join(profiles())}"


def test_without_coremltools_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "coremltools", None)
    mil.coremltools.cache_clear()
    with pytest.raises(QcError) as caught:
        export(random("qwen3"), tmp_path / "out")
    assert str(caught.value) == (
        'writing Core ML packages needs coremltools, which is not installed\n  fix    pip install "qc-compiler[ane]"'
    )
    mil.coremltools.cache_clear()


def test_a_weight_beyond_fp16_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    graph = random("qwen3")
    name = "model.layers.1.mlp.up_proj.weight"
    value = graph.tensor(name).detach().clone()
    value[3, 1] = 7e4
    graph.set_tensor(name, value)
    with pytest.raises(QcError) as caught:
        export(graph, tmp_path / "out", context=32, prefill=8, calibration=0)
    assert str(caught.value) == (
        f"{name} holds 70000, beyond the 65504 of fp16\n"
        f"  site   {name}\n"
        "  fix    run scale-residual before the export if it feeds the residual stream, or repair the model"
    )
    assert not list(tmp_path.iterdir())


def test_values_beyond_fp16_are_named_with_the_factor_that_helps(tmp_path: Path) -> None:
    graph = random("qwen3")
    name = "model.layers.1.mlp.down_proj.weight"
    graph.set_tensor(name, graph.tensor(name).detach() * 4e5)
    with pytest.raises(QcError) as caught:
        export(graph, tmp_path / "out", context=32, prefill=8)
    first = caught.value.errors[0] if isinstance(caught.value, QcErrors) else caught.value
    assert first.site == "model.layers.1.mlp.down_proj"
    assert "and ends at 32768 on the Neural Engine" in first.what
    assert first.fix.startswith("add scale-residual: {factor: 0.")
    assert not list(tmp_path.iterdir())


def test_every_profile_is_whole() -> None:
    for name in profiles():
        found = load_profile(name)
        assert found.name == name and found.chips and found.head_rows <= found.max_channels
        assert found.as_dict()["lut_bits"] == list(found.lut_bits)


def test_values_are_taken_from_a_graph_in_fp32_whatever_its_dtype() -> None:
    from runtimes.ane.ranges import peaks

    graph = random("qwen3")
    rows = [torch.randint(5, 99, (1, 16))]
    sites = {"model.layers.1.mlp.down_proj"}
    wide = peaks(graph, rows, sites)[0]
    half = peaks(random("qwen3").to(torch.float16), rows, sites)[0]
    assert wide.site == half.site and abs(wide.largest / half.largest - 1) < 1e-2


@pytest.mark.parametrize(
    ("options", "factors"),
    [
        ({"bits": 2, "rank": 4, "group": 8}, {"lut": 2.0**15, "scale_g": 2.0**-15}),
        ({"bits": 4, "scale": "channel"}, {"lut": 2.0**14, "scale": 2.0**-14}),
        ({"bits": 4, "vector": 2, "scale": "channel"}, {"lut": 2.0**14, "scale": 2.0**-14}),
    ],
)
def test_products_that_only_their_scales_make_small_are_named(
    options: dict[str, Any], factors: dict[str, float], tmp_path: Path
) -> None:
    graph = quantized(random("qwen3"), "lut", **options)
    site = "model.layers.1.mlp.up_proj"
    for suffix, factor in factors.items():
        name = f"{site}.weight.{suffix}"
        graph.set_tensor(name, graph.tensor(name).detach() * factor)
    with pytest.raises(QcError) as caught:
        export(graph, tmp_path / "out", context=32, prefill=8)
    assert caught.value.site == f"{site}/before its scale"
    assert "and ends at 32768 on the Neural Engine" in caught.value.what
    assert caught.value.fix == "quantize it with scale: channel or with fewer ranks, or hold it in fp16"
    assert not list(tmp_path.iterdir())


def test_the_product_before_a_scale_is_that_of_vectors() -> None:
    from runtimes.ane.ranges import unscaled
    from runtimes.ane.weights import weight_of

    graph = quantized(random("qwen3"), "lut", bits=4, vector=2, scale="channel")
    site = next(s for s in graph.sites("aten.linear") if s.name == "model.layers.1.mlp.up_proj")
    weight = weight_of(graph, site.input(1), site.name)
    x = torch.randn(3, weight.columns)
    kernel = torch.from_numpy(weight.dense()).double() / torch.from_numpy(weight.scale()).double()[:, None]
    found = unscaled(weight, x)
    assert found is not None
    torch.testing.assert_close(found.double(), (x.double() @ kernel.T).abs().amax(0), rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("options", [{"bits": 2, "rank": 4, "group": 8}, {"bits": 4, "scale": "channel"}])
def test_the_product_before_a_scale_is_that_of_levels_and_each_rank(options: dict[str, Any]) -> None:
    from runtimes.ane.ranges import unscaled
    from runtimes.ane.weights import weight_of

    graph = quantized(random("qwen3"), "lut", **options)
    site = next(s for s in graph.sites("aten.linear") if s.name == "model.layers.1.mlp.up_proj")
    weight = weight_of(graph, site.input(1), site.name)
    indices, levels = weight.table()
    kernel = torch.from_numpy(levels[0][indices]).double()
    x = torch.randn(3, weight.columns)
    scales = (
        [torch.from_numpy(b).double() for b in weight.factors()[1]] if weight.rank else [torch.tensor(1.0).double()]
    )
    wanted = max(float((x.double() * b @ kernel.T).abs().max()) for b in scales)
    found = unscaled(weight, x)
    assert found is not None and float(found.max()) == pytest.approx(wanted, rel=1e-5)
    plain = next(s for s in random("qwen3").sites("aten.linear") if s.name == "model.layers.1.mlp.up_proj")
    assert unscaled(weight_of(random("qwen3"), plain.input(1), plain.name), x) is None
