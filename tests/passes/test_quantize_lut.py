"""quantize-base with the scheme lut: the picture, a second run, the numbers, what trains, the errors."""

import hashlib
from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from graph import Graph, QcError, Selector, capture, capture_module
from graph.artifact import load, save
from graph.cache import Cache
from graph.formats import Lut, LutOptions, dense_value, fuse_dequantize, packed_sites, packed_tensors
from graph.formats.bits import look_up
from graph.lora_sets import updates
from graph.probe import probe_inputs
from graph.text import diff
from passes.add_lora import AddLora
from passes.dequantize import Dequantize
from passes.insert_kv_cache import InsertKvCache
from passes.merge_lora import MergeLora
from passes.quantize_base import QuantizeBase
from passes.runner import apply
from passes.set_trainable import SetTrainable
from tests.rewrites import assert_rewrites

EVERY = Selector(name="*")


class Mlp(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.up = nn.Linear(width, 64)
        self.down = nn.Linear(64, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


def config(**changes: Any) -> Qwen3Config:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 128, "vocab_size": 100}
    return Qwen3Config(**{**heads, **sizes, "tie_word_embeddings": True, **changes})


@cache
def captured() -> Graph:
    torch.manual_seed(0)
    return capture(Qwen3ForCausalLM(config()).eval())


def lut(**options: Any) -> QuantizeBase:
    return QuantizeBase(scheme="lut", lut=LutOptions(**{"rank": 4, "group": 8, **options}))


def quantized(**options: Any) -> Graph:
    """A small model; scales and levels that need no fitting, where none are asked for."""
    graph = captured().copy()
    lut(**{"levels": "uniform", "fit": "absmax", **options}).run(graph)
    graph.verify()
    return graph


def trained(graph: Graph) -> dict[str, str | None]:
    return {name: info.group for name, info in graph.tensors().items() if info.trainable}


def endings(names: Any) -> set[str]:
    return {str(name).rpartition(".")[2] for name in names}


# -- the picture ----------------------------------------------------------------------------------------------------

BEFORE = """
    x: f32[3, 32]
    up = linear(x, up.weight: f32[64, 32], up.bias: f32[64]) : f32[3, 64]
    relu = relu(up) : f32[3, 64]
    down = linear(relu, down.weight: f32[32, 64]) : f32[3, 32]
    add = add.Tensor(x, down) : f32[3, 32]
    return add
"""
FACTORED = """
    x: f32[3, 32]
    up.weight/dequantize = qc.dequantize_lut(up.weight.indices: u8[64, 8], up.weight.lut: f32[4], 32, model, scale_a=up.weight.scale_a: f32[64, 2], scale_b=up.weight.scale_b: f32[2, 32], scale_g=up.weight.scale_g: f32[2]) : f32[64, 32]
    up = linear(x, up.weight/dequantize, up.bias: f32[64]) : f32[3, 64]
    relu = relu(up) : f32[3, 64]
    down = linear(relu, down.weight: f32[32, 64]) : f32[3, 32]
    add = add.Tensor(x, down) : f32[3, 32]
    return add
"""
LATENT = """
    x: f32[3, 32]
    up.weight/fake_quantize = qc.fake_quantize_lut(up.weight.latent: f32[64, 32], up.weight.lut: f32[4], model, scale_a=up.weight.scale_a: f32[64, 2], scale_b=up.weight.scale_b: f32[2, 32], floor=1e-08) : f32[64, 32]
    up = linear(x, up.weight/fake_quantize, up.bias: f32[64]) : f32[3, 64]
    relu = relu(up) : f32[3, 64]
    down = linear(relu, down.weight: f32[32, 64]) : f32[3, 32]
    add = add.Tensor(x, down) : f32[3, 32]
    return add
"""


@pytest.mark.parametrize(("form", "after"), [("factored", FACTORED), ("latent", LATENT)])
def test_a_selected_linear_reads_levels_times_scales(form: Any, after: str) -> None:
    options = LutOptions(bits=2, rank=2, group=8, form=form)
    step = QuantizeBase(scheme="lut", select=Selector(name="up"), lut=options)
    assert_rewrites(step, Mlp(), torch.randn(3, 32), before=BEFORE, after=after)


GROUP = "up.weight.indices: u8[64, 12], up.weight.lut: f32[8], 32, model, scale=up.weight.scale: f32[64, 2])"
CHANNEL = "up.weight.indices: u8[64, 24], up.weight.lut: f32[64], 32, model, scale=up.weight.scale: f32[64, 1])"
NONE = "up.weight.indices: u8[64, 4], up.weight.lut: f32[2], 32, model)"
SHARED = "up.weight.indices: u8[64, 16], up.weight.lut: f32[4, 16], 32, model, scale=up.weight.scale: f32[64, 2])"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"bits": 3, "scale": "group", "group": 16}, GROUP),
        ({"bits": 6, "scale": "channel"}, CHANNEL),
        ({"bits": 1, "scale": "none", "train": "none"}, NONE),
        ({"scale": "group", "group": 16, "rows_per_lut": 16}, SHARED),
    ],
)
def test_each_kind_of_scale_has_its_own_line(options: dict[str, Any], line: str) -> None:
    graph = capture_module(Mlp(), torch.randn(3, 32))
    apply(QuantizeBase(scheme="lut", select=Selector(name="up"), lut=LutOptions(**options)), graph)
    assert f"up.weight/dequantize = qc.dequantize_lut({line} : f32[64, 32]" in str(graph)


def test_a_second_run_finds_nothing_to_do() -> None:
    for form in ("factored", "latent"):
        graph = quantized(form=form)
        text = str(graph)
        for step in (lut(form=form), lut(bits=2), QuantizeBase()):
            assert step.run(graph).changed == () and list(step.check(graph)) == []
            assert str(graph) == text


# -- the numbers ----------------------------------------------------------------------------------------------------


def test_a_preset_gives_the_mlp_and_attention_bits_and_ranks_of_their_own() -> None:
    graph = quantized(preset="q2a4", rank=None, group=2)
    sides = {site.role: packed_tensors(graph, site) for site in packed_sites(graph)}
    assert {role: (len(side["lut"]), side["scale_a"].shape[1]) for role, side in sides.items()} == {
        **dict.fromkeys(("attn.q", "attn.k", "attn.v", "attn.o"), (16, 8)),
        **dict.fromkeys(("mlp.gate", "mlp.up", "mlp.down"), (4, 32)),
    }


@pytest.mark.parametrize(
    ("preset", "mlp", "attention"),
    [("q4a4", (16, 4), (16, 4)), ("q4_r32", (16, 32), (16, 32)), ("q2a2", (4, 32), (4, 32))],
)
def test_the_other_presets(preset: Any, mlp: tuple[int, int], attention: tuple[int, int]) -> None:
    options = LutOptions(preset=preset)
    forms = [options.form_for(role, (64, 64)) for role in ("mlp.up", "attn.q")]
    assert [(form.levels, form.rank) for form in forms if isinstance(form, Lut)] == [mlp, attention]


def test_what_is_stored_is_the_nearest_level_of_every_weight() -> None:
    w = captured().tensor("model.layers.0.mlp.up_proj.weight").detach()
    graph = quantized(bits=2, levels="fitted", fit="mse")
    site = next(site for site in packed_sites(graph) if "0.mlp.up_proj" in site.name)
    sides = packed_tensors(graph, site)
    a, b = (torch.nn.functional.normalize(sides[key], dim=dim) for key, dim in (("scale_a", 0), ("scale_b", 1)))
    s = (a * sides["scale_g"]) @ b
    dense, q = dense_value(graph, site), look_up(sides["indices"], sides["lut"], 64)
    torch.testing.assert_close(dense, q * s, rtol=1e-5, atol=1e-8)
    best = (w[..., None] - s[..., None] * sides["lut"]).abs().amin(-1)
    assert ((w - dense).abs() <= best + 1e-7).all()
    assert (
        sides["lut"].equal(sides["lut"].half().float())
        and (sides["lut"].diff() > 0).all()
        and (sides["lut"] != 0).all()
    )


def test_fitting_loses_less_than_the_largest_magnitudes_and_more_bits_less_than_fewer() -> None:
    def snr_db(**options: Any) -> float:
        graph = capture_module(Mlp(), torch.randn(3, 32))
        step = QuantizeBase(scheme="lut", select=EVERY, lut=LutOptions(**options))
        return float(step.run(graph).figures["mean_snr_db"])

    by_bits = [snr_db(bits=bits, scale="group", group=8) for bits in (1, 2, 3, 4, 6, 8)]
    assert by_bits == sorted(by_bits)
    plain = snr_db(bits=2, rank=4, group=8, levels="uniform", fit="absmax")
    levels = snr_db(bits=2, rank=4, group=8, fit="absmax")
    assert plain + 1 < levels < snr_db(bits=2, rank=4, group=8)


def test_the_report_counts_bytes_now_and_once_baked() -> None:
    graph = capture_module(Mlp(), torch.randn(3, 32))
    report = apply(QuantizeBase(scheme="lut", select=EVERY, lut=LutOptions(bits=2, rank=2, group=8)), graph)
    figures = dict(report.figures)
    weights, factors = 2 * 64 * 32, 2 * 2 * (64 + 32)
    assert figures["weights"] == weights
    assert figures["bytes_after"] == weights // 4 + 4 * (factors + 2 * 2 + 2 * 4)
    assert figures["bytes_once_baked"] == weights // 4 + 2 * (factors + 2 * 4)
    assert figures["bits_per_weight"] == round(8 * int(figures["bytes_after"]) / weights, 3)
    assert figures["bits_per_weight_once_baked"] == round(8 * int(figures["bytes_once_baked"]) / weights, 3)
    assert figures["scales_not_positive"] == 0.0


def test_the_share_of_scales_that_turn_a_sign_is_reported() -> None:
    model = Mlp()
    with torch.no_grad():
        model.up.weight.zero_()
        model.up.weight[:32, :16] = 1.0
        model.up.weight[32:, 16:] = 1.0
        model.up.weight[:32, 16:] = 0.9
    graph = capture_module(model, torch.randn(3, 32))
    options = LutOptions(bits=4, rank=1, group=16, levels="uniform", fit="absmax")
    apply(QuantizeBase(scheme="lut", select=Selector(name="up"), lut=options), graph, check=False)
    (site,) = packed_sites(graph)
    sides = packed_tensors(graph, site)
    share = ((sides["scale_a"] * sides["scale_g"]) @ sides["scale_b"] <= 0).double().mean().item()
    again = capture_module(model, torch.randn(3, 32))
    step = QuantizeBase(scheme="lut", select=Selector(name="up"), lut=options)
    assert step.run(again).figures["scales_not_positive"] == round(share, 6)


def test_dequantizing_gives_levels_times_scales_whatever_the_form() -> None:
    for form in ("factored", "latent"):
        graph = quantized(bits=2, form=form)
        ids = probe_inputs(graph)
        wanted, dense = graph(**ids), {site.name: dense_value(graph, site) for site in packed_sites(graph)}
        report = apply(Dequantize(), graph)
        assert len(report.changed) == len(dense) == 7
        assert graph(**ids).equal(wanted)
        assert not trained(graph) and str(graph) == str(captured())
        values = [graph.tensor(name.rpartition("/")[0]) for name in dense]
        assert all(value.equal(one) for value, one in zip(values, dense.values(), strict=True))


def test_the_dtype_of_a_model_leaves_levels_and_scales_alone() -> None:
    graph = quantized(form="factored").to(torch.bfloat16)
    assert {graph.dtype_of(n) for n in graph.tensors() if ".scale" in n or n.endswith(".lut")} == {torch.float32}
    assert graph(**probe_inputs(graph)).dtype == torch.bfloat16
    latent = quantized(form="latent").to(torch.bfloat16)
    assert {latent.dtype_of(n) for n in latent.tensors() if n.endswith(".latent")} == {torch.bfloat16}


def test_of_tied_weights_there_is_one_with_two_readers() -> None:
    graph = captured().copy()
    step = replace(lut(), select=Selector(role="head"))
    assert apply(step, graph).changed == ("model.embed_tokens", "lm_head")
    (site,) = packed_sites(graph)
    assert graph.info("model.embed_tokens.weight.scale_a").aliases == ("lm_head.weight.scale_a",)
    assert graph.site("lm_head").input(1) is site.node


# -- what trains ----------------------------------------------------------------------------------------------------


def step(graph: Graph, steps: int = 1) -> None:
    parameters = [p for p in graph.module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    ids = torch.randint(0, 100, (2, 12), generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        logits = graph(input_ids=ids)
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def hashes(graph: Graph) -> dict[str, str]:
    values = {name: graph.tensor(name).detach().contiguous() for name in graph.tensors()}
    return {n: hashlib.sha256(v.view(torch.uint8).numpy().tobytes()).hexdigest() for n, v in values.items()}


@pytest.mark.parametrize(
    ("options", "group", "suffixes"),
    [
        ({}, "scales", {"scale_a", "scale_b", "scale_g"}),
        ({"scale": "group", "rank": None}, "scales", {"scale"}),
        ({"form": "latent"}, "scales", {"scale_a", "scale_b"}),
        ({"form": "latent", "train": "weights"}, "weights", {"latent"}),
    ],
)
def test_what_trains_changes_and_nothing_else_does(options: dict[str, Any], group: str, suffixes: set[str]) -> None:
    graph = quantized(**options)
    assert set(trained(graph).values()) == {group} and endings(trained(graph)) == suffixes
    work = graph.copy()
    assert fuse_dequantize(work) == 7
    before = hashes(graph)
    step(work, 10)
    changed = {name for name, digest in hashes(graph).items() if digest != before[name]}
    assert changed == set(trained(graph))


def test_nothing_trains_where_nothing_shall() -> None:
    assert trained(quantized(train="none")) == {}


def test_the_trainable_counts_are_those_of_the_specification() -> None:
    shape = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8}
    graph = capture(config(**shape, num_hidden_layers=1, head_dim=128))
    figures = apply(QuantizeBase(scheme="lut", lut=LutOptions(preset="q2a4")), graph).figures
    assert figures["bits_per_weight_once_baked"] == 3.283

    def count(*suffixes: str) -> int:
        return 28 * sum(prod(graph.shape(name)) for name in trained(graph) if endings([name]) <= set(suffixes))

    assert count("scale_a", "scale_b") == 13_303_808
    assert count("scale_g") == 3_584
    apply(SetTrainable(select=Selector(name="*.scale_g")), graph)
    assert (count("scale_a", "scale_b"), count("scale_g")) == (0, 3_584)
    apply(SetTrainable(select=Selector(role="mlp.*", name="*.scale_*")), graph)
    assert (count("scale_a", "scale_b"), count("scale_g")) == (11_010_048, 2_688)


def test_set_trainable_picks_levels_and_scales_by_name_and_refuses_indices() -> None:
    graph = quantized()
    apply(SetTrainable(select=Selector(role="attn.*", name="*.lut")), graph)
    assert endings(trained(graph)) == {"lut"}
    assert all(".self_attn." in name for name in trained(graph))
    with pytest.raises(QcError) as caught:
        apply(SetTrainable(select=Selector(role="attn.q")), graph, line="r.yaml:9:5")
    assert str(caught.value) == (
        "model.layers.0.self_attn.q_proj.weight.indices is part of a packed weight, which cannot train\n"
        "  recipe r.yaml:9:5\n"
        "  fix    run dequantize first, or exclude '*.indices'"
    )
    apply(SetTrainable(select=Selector(role="attn.q", exclude="*.indices")), graph)
    assert endings(trained(graph)) == {"lut", "scale_a", "scale_b", "scale_g"}


# -- with everything else -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"form": "latent"}, {"scale": "group", "rank": None, "rows_per_lut": 16}])
def test_an_artifact_computes_the_same_bits(options: dict[str, Any], tmp_path: Path) -> None:
    graph = quantized(**options)
    inputs = probe_inputs(graph)
    save(tmp_path / "a", graph)
    back = load(tmp_path / "a").graph
    assert diff(str(graph), str(back)) == "" and back.tensors() == graph.tensors()
    assert back(**inputs).equal(graph(**inputs)) and back.materialize()(**inputs).equal(graph(**inputs))


def test_with_a_cache_the_logits_are_those_without() -> None:
    graph, ids = quantized(bits=2), torch.randint(0, 100, (1, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = graph(input_ids=ids)
        apply(InsertKvCache(), graph)
        cached = Cache(graph, 1, 9)
        found = torch.cat([cached.run(one, torch.ones_like(one)) for one in ids.split(1, dim=1)], dim=1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["factored", "latent"])
@pytest.mark.parametrize("into", ["dequantized", "requantized"])
def test_lora_trains_on_a_lut_base_and_is_merged_into_it(form: Any, into: Any) -> None:
    graph = quantized(form=form, train="none")
    inputs = probe_inputs(graph)
    base = graph(**inputs)
    apply(AddLora(rank=2), graph)
    assert graph(**inputs).equal(base) and {str(group) for group in trained(graph).values()} == {"lora.default"}
    generator = torch.Generator().manual_seed(7)
    for update in updates(graph):
        graph.set_tensor(update.b, 0.01 * torch.randn(graph.shape(update.b), generator=generator))
    moved = graph(**inputs)
    report = apply(MergeLora(into=into), graph)
    assert bool(packed_sites(graph)) == (into == "requantized")
    if into == "dequantized":
        torch.testing.assert_close(graph(**inputs), moved, rtol=1e-4, atol=1e-4)
    else:
        assert 0.5 < float(report.figures["lora/survived"]) < 1.5


def test_a_plan_is_rewritten_as_a_model_with_weights_is() -> None:
    for form in ("factored", "latent"):
        plan = capture(config())
        report = apply(lut(form=form), plan)
        assert diff(str(plan), str(quantized(form=form))) == ""
        assert "mean_snr_db" not in report.figures and "scales_not_positive" not in report.figures
        apply(Dequantize(), plan)
        assert str(plan) == str(captured())


def test_weights_are_unpacked_in_a_compute_dtype_if_one_is_set() -> None:
    graph = capture_module(Mlp(), torch.randn(3, 32))
    options = LutOptions(rank=2, group=8)
    apply(QuantizeBase(scheme="lut", select=Selector(name="up"), lut=options, compute_dtype="bf16"), graph)
    assert "32, bf16, scale_a=" in str(graph)
    assert "up.weight/cast = to.dtype(up.weight/dequantize, model) : f32[64, 32]" in str(graph)
