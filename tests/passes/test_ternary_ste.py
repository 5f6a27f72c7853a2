from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from graph import Graph, QcError, Selector, capture, capture_module
from graph.formats import TernaryRule, dense_value, packed_sites
from graph.formats.ternary_start import fitted_with_feedback
from graph.formats.trits import unpack_trits
from graph.moments import COVARIANCE, keep_moments
from passes.add_lora import AddLora
from passes.freeze_ternary import FreezeTernary
from passes.quantize_base import QuantizeBase
from passes.runner import apply
from passes.ternary_ste import SIZES, TernarySte
from tests.passes.lut_models import ALL, Mlp, x
from tests.passes.ternary_models import latent, plain
from tests.rewrites import assert_rewrites

BEFORE = """
    x: f32[8, 64]
    up = linear(x, up.weight: f32[64, 64], up.bias: f32[64]) : f32[8, 64]
    relu = relu(up) : f32[8, 64]
    down = linear(relu, down.weight: f32[64, 64]) : f32[8, 64]
    add = add.Tensor(x, down) : f32[8, 64]
    return add
"""
AFTER = """
    x: f32[8, 64]
    up.weight/fake_quantize = qc.fake_quantize_ternary(up.weight.latent: f32[64, 64], model, dead-zone, 0.05, absmean, 64) : f32[64, 64]
    x/int8 = qc.fake_quantize_tokens(x, 8) : f32[8, 64]
    up = linear(x/int8, up.weight/fake_quantize, up.bias: f32[64]) : f32[8, 64]
    relu = relu(up) : f32[8, 64]
    down.weight/fake_quantize = qc.fake_quantize_ternary(down.weight.latent: f32[64, 64], model, dead-zone, 0.05, absmean, 64) : f32[64, 64]
    relu/int8 = qc.fake_quantize_tokens(relu, 8) : f32[8, 64]
    down = linear(relu/int8, down.weight/fake_quantize) : f32[8, 64]
    add = add.Tensor(x, down) : f32[8, 64]
    return add
"""


def test_weights_become_ternary_and_inputs_eight_bits() -> None:
    assert_rewrites(TernarySte(select=ALL, act_bits=8), Mlp(), x, before=BEFORE, after=AFTER)


def test_a_second_run_changes_nothing() -> None:
    graph = latent(act_bits=8)
    before = str(graph)
    assert apply(TernarySte(select=ALL, act_bits=8), graph).changed == ()
    assert str(graph) == before


def test_the_weights_are_those_of_the_formula_and_the_report_counts_them() -> None:
    graph = plain()
    w = graph.tensor("up.weight").detach()
    report = apply(TernarySte(select=Selector(name="up"), tau=0.5), graph)
    alpha = w.abs().mean(-1, keepdim=True)
    wanted = alpha * w.sign() * (w.abs() >= 0.5 * alpha)
    torch.testing.assert_close(dense_value(graph, packed_sites(graph)[0]), wanted)
    assert report.changed == ("up",)
    figures = dict(report.figures)
    assert figures["zero_share"] == round(float((wanted == 0).float().mean()), 5)
    assert figures["worst_relative_error"] == round(float((wanted - w).norm() / w.norm()), 5)
    assert {key: figures[key] for key in ("size", "target_ratio", "rule", "tau", "weights", "kept", "kept_values")} == {
        "size": "tiny",
        "target_ratio": 6,
        "rule": "dead-zone",
        "tau": 0.5,
        "weights": 64 * 64,
        "kept": "down.weight",
        "kept_values": 64 * 64,
    }


@pytest.mark.parametrize(("parameters", "tau"), [(49e6, 0.05), (50e6, 0.1), (499e6, 0.1), (1e9, 0.15), (2e9, 0.2)])
def test_the_threshold_grows_with_the_model(parameters: float, tau: float) -> None:
    assert next(size[2] for size in SIZES if parameters < size[1]) == tau


def test_norms_biases_embedding_and_head_stay_to_the_bit() -> None:
    config = Qwen3Config(
        hidden_size=64,
        intermediate_size=128,
        vocab_size=100,
        head_dim=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        attention_bias=True,
    )
    torch.manual_seed(0)
    graph = capture(Qwen3ForCausalLM(config))
    before = {name: graph.tensor(name).detach().clone() for name in graph.tensors()}
    report = apply(TernarySte(), graph)
    layers = [name for name in graph.tensors() if name.endswith(".latent")]
    assert len(layers) == 7 and all("_proj.weight" in name for name in layers)
    assert report.figures["kept"] == "model.embed_tokens.weight, lm_head.weight"
    stay = before.keys() - {name.removesuffix(".latent") for name in layers}
    assert {"model.norm.weight", "lm_head.weight", "model.layers.0.self_attn.q_norm.weight"} < stay
    assert "model.layers.0.self_attn.q_proj.bias" in stay
    assert all(torch.equal(graph.tensor(name), before[name]) for name in stay)


@pytest.mark.parametrize(
    ("train", "trained"),
    [
        ("weights", {"latent": "weights"}),
        ("scales", {"scale": "scales"}),
        ("weights+scales", {"latent": "weights", "scale": "scales"}),
        ("none", {}),
    ],
)
def test_what_trains_is_in_its_group(train: Any, trained: dict[str, str]) -> None:
    infos = latent(train=train).tensors()
    found = {n.removeprefix("up.weight."): i.group for n, i in infos.items() if i.trainable and "up.weight." in n}
    assert found == trained


def test_latents_move_and_the_integers_follow_at_every_step() -> None:
    graph = latent()
    (site, _) = packed_sites(graph)
    name, before = "up.weight.latent", dense_value(graph, site).sign()
    for _ in range(8):
        (grad,) = torch.autograd.grad(graph(x).square().sum(), graph.tensor(name))
        graph.set_tensor(name, graph.tensor(name).detach() - 0.05 * grad / grad.abs().max())
        graph.set_info(name, trainable=True, group="weights")
    assert (dense_value(graph, site).sign() != before).float().mean() > 0.01


def test_moments_weigh_the_scale_and_are_used_up() -> None:
    graph = plain()
    w, moments = graph.tensor("up.weight").detach(), torch.rand(64, generator=torch.Generator().manual_seed(0))
    keep_moments(graph, "up.weight", graph.site("up"), moments)
    apply(TernarySte(select=Selector(name="up"), scale="least-squares"), graph)
    assert "up.weight_moments" not in graph.tensors()
    assert graph.info("up.weight.moments").kind == "buffer"
    made = dense_value(graph, packed_sites(graph)[0])
    q = made.sign()
    alpha = (w * q * moments).sum(-1) / (q.square() * moments).sum(-1)
    torch.testing.assert_close(made, q * alpha[:, None])


def measured() -> Graph:
    """The net, and what its linears read: columns that vary together."""
    graph, generator = plain(), torch.Generator().manual_seed(0)
    for name in ("up", "down"):
        read = torch.randn(256, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
        together = read.t() @ read / len(read)
        keep_moments(graph, f"{name}.weight", graph.site(name), together, COVARIANCE)
        keep_moments(graph, f"{name}.weight", graph.site(name), together.diagonal().clone())
    return graph


BEGUN: dict[str, Any] = {"tau": 0.7, "scale": "least-squares", "granularity": "group", "group": 16}


def test_with_a_covariance_weights_begin_where_outputs_lose_least_and_it_is_used_up() -> None:
    graph = measured()
    w, together = graph.tensor("up.weight").detach(), graph.tensor("up.weight_covariance")
    moments = graph.tensor("up.weight_moments")
    integers, scale = fitted_with_feedback(w, together, TernaryRule("dead-zone", 0.7, "least-squares", 16))
    report = apply(TernarySte(select=ALL, **BEGUN), graph)
    made = dense_value(graph, packed_sites(graph)[0])
    torch.testing.assert_close(made, integers * scale.repeat_interleave(16, 1))
    assert made.sign().equal(integers)
    assert not any("covariance" in name or "moments" in name for name in graph.tensors())
    assert graph.info("up.weight.latent").trainable
    alone = plain()
    keep_moments(alone, "up.weight", alone.site("up"), moments)
    keep_moments(alone, "down.weight", alone.site("down"), moments)
    lower = apply(TernarySte(select=ALL, **BEGUN), alone).figures
    off = [w - dense_value(one, packed_sites(one)[0]) for one in (graph, alone)]
    lost = [float((one @ together * one).sum()) for one in off]
    assert lost[0] < 0.5 * lost[1]
    assert float(report.figures["worst_relative_error"]) > float(lower["worst_relative_error"]), "of the weight itself"


def test_frozen_integers_are_those_that_were_begun_with() -> None:
    graph = measured()
    w, together = graph.tensor("up.weight").detach(), graph.tensor("up.weight_covariance")
    integers, _ = fitted_with_feedback(w, together, TernaryRule("dead-zone", 0.7, "least-squares", 16))
    apply(TernarySte(select=ALL, **BEGUN), graph)
    apply(FreezeTernary(), graph)
    assert (unpack_trits(graph.tensor("up.weight.indices"), "2bit", 64).int() - 1).equal(integers.int())


def test_a_covariance_is_refused_where_weights_begin_as_they_are() -> None:
    graph = measured()
    graph.module.graph.eliminate_dead_code()
    graph.remove_tensor("up.weight_moments")
    assert message(graph) == (
        "calibrate measured the covariance of what reads up.weight, and with a scale of absmean weights begin as they are\n"
        "  site   up\n  fix    take covariance out of this calibrate"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"tau": 0.1, "rule": "round-clip"},
            "tau is given, and round-clip has no threshold\n  fix    take tau out, or set rule to dead-zone",
        ),
        (
            {"tau": 1.5},
            "tau is 1.5, a share of the mean magnitude\n  fix    give a number above 0 and up to 1, such as 0.1",
        ),
        ({"granularity": "group"}, "granularity is group, and no group is given\n  fix    set group to 128, say"),
        (
            {"group": 16},
            "group is given, and granularity is channel\n  fix    set granularity to group, or take group out",
        ),
    ],
)
def test_options_that_do_not_go_together_are_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(QcError) as caught:
        apply(TernarySte(select=ALL, **options), plain())
    assert str(caught.value) == said


def message(graph: Any, **options: Any) -> str:
    with pytest.raises(QcError) as caught:
        apply(TernarySte(select=Selector(name="up"), **options), graph)
    return str(caught.value)


def test_weights_that_cannot_become_ternary_are_named() -> None:
    assert message(plain(), granularity="group", group=48) == (
        "group 48 does not divide the 64 input columns of up.weight\n"
        "  site   up\n  fix    set it to 32 or another divisor of 64"
    )
    packed = plain()
    apply(QuantizeBase(select=ALL), packed)
    assert message(packed) == (
        "the weight is packed in another format\n  site   up\n  fix    dequantize it first, or exclude it from select"
    )
    measured = plain()
    keep_moments(measured, "up.weight", measured.site("up"), torch.ones(64))
    assert message(measured) == (
        "calibrate measured what reads up.weight, and a scale of absmean does not use it\n"
        "  site   up\n  fix    set scale to least-squares, or take calibrate out"
    )
    adapted = plain()
    apply(AddLora(rank=2, select=ALL), adapted)
    assert message(adapted, act_bits=8) == (
        "up has an adapter, which would read other inputs\n"
        "  site   up\n  fix    move this pass before add-lora, or take act_bits out"
    )
    broken = capture_module(Mlp(), x)
    broken.set_tensor("up.weight", torch.full((64, 64), torch.nan))
    assert message(broken) == (
        "up.weight holds NaN or infinity\n  site   up\n  fix    repair the model, or exclude this weight from select"
    )
