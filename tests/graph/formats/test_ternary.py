import math
from typing import Any

import pytest
import torch
from torch import Tensor

from graph import Graph, capture_module
from graph.formats import (
    Ternary,
    TernaryRule,
    dense_value,
    fake_quantize_tokens,
    fidelity,
    format_of,
    fuse_dequantize,
    packed_sites,
    store_packed,
)
from graph.formats.format import unpack
from graph.formats.ternary import dequantize_ternary, fake_quantize_ternary
from graph.formats.ternary_rule import Fit, Rule
from graph.formats.trits import PACKINGS, Packing
from tests.passes.lut_models import Mlp, x

GROUPS = [64, 16, None]
RULES: list[tuple[Rule, float | None]] = [("dead-zone", 0.1), ("dead-zone", 1.0), ("round-clip", None)]


def normal(rows: int = 64, columns: int = 64, seed: int = 0) -> Tensor:
    return 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def ternary(rule: Rule = "dead-zone", tau: float | None = 0.1, fit: Fit = "absmean", group: int | None = 64) -> Tensor:
    """A weight that is ternary already."""
    w = normal()
    return TernaryRule(rule, tau, fit, group).fitted(w).dense(w)


# -- C1 to C4 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "tau"), RULES)
@pytest.mark.parametrize("group", GROUPS)
def test_values_are_minus_one_zero_and_one_times_their_scale(rule: Rule, tau: float | None, group: int | None) -> None:
    by = TernaryRule(rule, tau, "absmean", group)
    grid = by.fitted(normal())
    assert grid.codes(normal()).unique().tolist() == [0, 1, 2]
    share = normal().shape[1] // grid.scale.shape[1]
    q = grid.dense(normal()) / grid.scale.repeat_interleave(share, dim=1)
    assert q.unique().tolist() == [-1, 0, 1]


def test_a_weight_of_zeros_has_the_smallest_scale_and_stays_zero() -> None:
    for rule, tau in RULES:
        for fit in ("absmean", "least-squares"):
            grid = TernaryRule(rule, tau, fit, 8).fitted(torch.zeros(4, 8))
            assert grid.scale.flatten().tolist() == pytest.approx([1e-8] * 4)
            assert not grid.dense(torch.zeros(4, 8)).any()


@pytest.mark.parametrize("tau", [0.05, 0.1, 0.2, 0.5])
def test_of_normal_weights_the_share_of_zeros_is_that_of_the_error_function(tau: float) -> None:
    w = normal(512, 2048)
    zeros = TernaryRule("dead-zone", tau, "absmean", 2048).fitted(w).dense(w).eq(0).double().mean()
    assert abs(float(zeros) - math.erf(tau / math.sqrt(math.pi))) < 0.005


def test_round_clip_rounds_and_clips() -> None:
    w = torch.tensor([[0.2, -0.5, 0.5000001, 1.4, -2.0, 1.4]])
    grid = TernaryRule("round-clip", None, "absmean", 6).fitted(w)
    assert grid.dense(w).div(grid.scale).equal(w.div(grid.scale).round().clamp(-1, 1))
    half = torch.tensor([[0.5, -0.5, 1.0, 2.0]])  # of a mean of 1: halves round to the even 0
    assert TernaryRule("round-clip", None, "absmean", 4).fitted(half).codes(half).tolist() == [[1, 1, 2, 2]]


def test_the_scale_is_the_mean_magnitude() -> None:
    w = normal()
    torch.testing.assert_close(TernaryRule(group=64).fitted(w).scale, w.abs().mean(-1, keepdim=True))
    torch.testing.assert_close(TernaryRule(group=None).fitted(w).scale, w.abs().mean().view(1, 1))
    groups = w.abs().view(64, 4, 16).mean(-1)
    torch.testing.assert_close(TernaryRule(group=16).fitted(w).scale, groups)


@pytest.mark.parametrize(("rule", "tau"), RULES)
@pytest.mark.parametrize("group", GROUPS)
def test_least_squares_is_never_worse(rule: Rule, tau: float | None, group: int | None) -> None:
    w = normal()
    errors = [
        (TernaryRule(rule, tau, fit, group).fitted(w).dense(w) - w).square() for fit in ("least-squares", "absmean")
    ]
    assert (errors[0].sum() <= errors[1].sum()) and errors[0].sum() > 0
    if group == 64:
        assert (errors[0].sum(-1) <= errors[1].sum(-1) * (1 + 1e-6)).all()


def test_moments_weigh_the_columns_of_the_fit() -> None:
    w, moments = normal(), torch.rand(64, generator=torch.Generator().manual_seed(1)).square()
    by = TernaryRule("dead-zone", 0.5, "least-squares", 64)

    def error(made: Tensor) -> float:
        return float(((made - w).square() * moments).sum())

    assert error(by.fitted(w, moments).dense(w)) < error(by.fitted(w).dense(w))
    blind = by.fitted(w, torch.zeros(64))
    assert blind.scale.equal(TernaryRule("dead-zone", 0.5, "absmean", 64).fitted(w).scale)


@pytest.mark.parametrize(("rule", "tau"), RULES)
@pytest.mark.parametrize("group", GROUPS)
def test_a_ternary_weight_keeps_its_integers_and_by_least_squares_its_scale(
    rule: Rule, tau: float | None, group: int | None
) -> None:
    made = ternary(rule, tau, "absmean", group)
    again = TernaryRule(rule, tau, "least-squares", group).fitted(made)
    assert again.dense(made).equal(made)


@pytest.mark.parametrize(("rule", "tau"), RULES)
def test_a_mean_found_anew_shrinks_by_the_share_of_zeros(rule: Rule, tau: float | None) -> None:
    made = ternary(rule, tau)
    by = TernaryRule(rule, tau, "absmean", 64)
    old, new = by.fitted(normal()), by.fitted(made)
    assert new.codes(made).equal(old.codes(normal()))
    zeros = made.eq(0).float().mean(-1, keepdim=True)
    torch.testing.assert_close(new.scale, old.scale * (1 - zeros), rtol=1e-6, atol=0)


# -- C5 and the format ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("group", GROUPS)
def test_packed_and_latent_weights_are_the_same_and_faithful(packing: Packing, group: int | None) -> None:
    w = normal()
    by = TernaryRule(group=group)
    latent = Ternary(columns=64, by=by)
    packed = Ternary(columns=64, by=by, latent=False, packing=packing)
    sides = packed.pack(w)
    assert sides["indices"].dtype == torch.uint8 and list(sides) == ["indices", "scale"]
    assert unpack(packed, sides, torch.float32).equal(unpack(latent, latent.pack(w), torch.float32))
    assert fidelity(packed, w, sides).faithful and fidelity(latent, w, latent.pack(w)).faithful
    wrong = {**sides, "scale": -sides["scale"]}
    assert not fidelity(packed, w, wrong).faithful


@pytest.mark.parametrize("group", GROUPS)
def test_sizes_without_values_are_those_with(group: int | None) -> None:
    for form in (
        Ternary(columns=64, by=TernaryRule(group=group), own_scale=True, weighted=True),
        Ternary(columns=64, by=TernaryRule(group=group), latent=False, packing="trit5", baked=True),
    ):
        real, bare = form.pack(normal()), form.pack(normal().to("meta"))
        assert {k: (v.shape, v.dtype) for k, v in real.items()} == {k: (v.shape, v.dtype) for k, v in bare.items()}
        assert unpack(form, bare, torch.bfloat16).shape == (64, 64)


@pytest.mark.parametrize("packing", PACKINGS)
def test_bytes_are_those_of_the_formula(packing: Packing) -> None:
    form = Ternary(columns=1000, by=TernaryRule(group=1000), latent=False, packing=packing, baked=True)
    held = sum(side.nbytes for side in form.pack(normal(32, 1000)).values())
    assert held == form.bytes_packed(32, packing) == 32 * 1000 * {"2bit": 2, "trit5": 1.6}[packing] / 8 + 2 * 32


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("packing", [*PACKINGS, None])
def test_a_graph_tells_its_format(group: int | None, packing: Packing | None) -> None:
    graph = stored(packing, TernaryRule(group=group))
    form = format_of(packed_sites(graph)[0])
    assert isinstance(form, Ternary)
    assert (form.latent, form.by.group, form.columns) == (packing is None, group, 64)
    assert form.name == {64: "ternary, one scale a row", 16: "ternary, groups of 16", None: "ternary, one scale"}[group]
    assert dense_value(graph, packed_sites(graph)[0]).unique().numel() > 2


# -- C7 and fusing --------------------------------------------------------------------------------------------------


def test_the_latent_weight_gets_the_gradient_of_the_quantized_point() -> None:
    latent, inputs = normal().requires_grad_(), torch.randn(5, 64)
    made = fake_quantize_ternary(latent, torch.float32, "dead-zone", 0.1, "absmean", 64)
    (inputs @ made.t()).square().sum().backward()
    point = made.detach().requires_grad_()
    (inputs @ point.t()).square().sum().backward()
    assert latent.grad is not None and point.grad is not None and latent.grad.equal(point.grad)


@pytest.mark.parametrize("group", GROUPS)
def test_a_scale_of_its_own_gets_the_integers_times_the_gradient(group: int | None) -> None:
    w, grad = normal(), normal(seed=1)
    by = TernaryRule(group=group)
    grid = by.fitted(w)
    wanted_scale = grid.scale.clone().requires_grad_()
    q = grid.codes(w).float() - 1
    (q * wanted_scale.repeat_interleave(64 // grid.scale.shape[1], dim=1) * grad).sum().backward()
    scale = grid.scale.clone().requires_grad_()
    (fake_quantize_ternary(w, torch.float32, "dead-zone", 0.1, "absmean", group, scale=scale) * grad).sum().backward()
    sides = Ternary(columns=64, by=by, latent=False, packing="trit5").pack(w)
    frozen = sides["scale"].clone().requires_grad_()
    (dequantize_ternary(sides["indices"], frozen, 64, "trit5", torch.float32) * grad).sum().backward()
    for found in (scale.grad, frozen.grad):
        assert found is not None and wanted_scale.grad is not None
        torch.testing.assert_close(found, wanted_scale.grad)


def stored(packing: Packing | None, by: TernaryRule, **options: Any) -> Graph:
    torch.manual_seed(0)
    graph = capture_module(Mlp(), x)
    for name in ("up.weight", "down.weight"):
        form = Ternary(columns=64, by=by, latent=packing is None, packing=packing or "2bit", **options)
        store_packed(graph, name, form, form.pack(graph.tensor(name).detach()))
        if packing is None:
            graph.set_info(f"{name}.latent", trainable=True)
        if options.get("own_scale") or packing is not None:
            graph.set_info(f"{name}.scale", trainable=True)
    graph.verify()
    return graph


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("packing", "options"), [("2bit", {}), ("trit5", {}), (None, {}), (None, {"own_scale": True})])
def test_a_fused_linear_has_the_same_bits_and_gradients(
    packing: Packing | None, options: dict[str, Any], group: int | None
) -> None:
    graph = stored(packing, TernaryRule("round-clip", None, "least-squares", group), **options)
    fused = graph.copy()
    assert fuse_dequantize(fused) == 2
    assert "quantize" not in str(fused) and "linear(" not in str(fused)
    trained = [name for name, info in graph.tensors().items() if info.trainable]
    assert len(trained) > 1
    for one, other in zip(outcome(graph, trained), outcome(fused, trained), strict=True):
        assert one.equal(other)


def outcome(graph: Graph, trained: list[str]) -> list[Tensor]:
    inputs = x.clone().requires_grad_()
    y = graph(inputs)
    return [y, *torch.autograd.grad(y.square().sum(), [inputs, *(graph.tensor(name) for name in trained)])]


# -- activations ----------------------------------------------------------------------------------------------------


def test_tokens_are_rounded_to_eight_bits_of_their_largest_magnitude() -> None:
    tokens = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    gamma = tokens.abs().amax(-1, keepdim=True)
    found = fake_quantize_tokens(tokens)
    torch.testing.assert_close(found, (127 * tokens / gamma).round().clamp(-128, 127) * gamma / 127)
    assert (found - tokens).abs().max() <= gamma.max() / 254 * 1.001
    assert not fake_quantize_tokens(torch.zeros(1, 4)).any()
    assert fake_quantize_tokens(tokens.half()).dtype == torch.float16


def test_gradients_pass_the_rounding_of_tokens_unchanged() -> None:
    tokens = torch.randn(3, 8).requires_grad_()
    (grad,) = torch.autograd.grad((fake_quantize_tokens(tokens) * torch.arange(8)).sum(), tokens)
    assert grad.equal(torch.arange(8.0).expand(3, 8))
