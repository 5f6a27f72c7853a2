"""Levels that train: from theta, or freely; through every pass that changes a LUT weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from graph import Graph, QcError, QcErrors, Selector, capture_module
from graph.formats import LutOptions, format_of, packed_sites, packed_tensors
from graph.formats.bits import look_up, pack_bits
from graph.formats.levels import monotone_levels, theta_of, trainable_levels
from graph.formats.lut_levels import in_order
from passes.convert_scales import ConvertScales
from passes.dequantize import Dequantize
from passes.freeze_q import FreezeQ
from passes.quantize_base import QuantizeBase
from passes.requantize import Requantize
from passes.runner import apply
from passes.set_trainable import SetTrainable
from passes.snap import Snap
from passes.ste_fp16 import SteFp16
from runtimes.settings import Group, Kd
from tests.passes.lut_models import ALL, Mlp, latent, packed, x
from tests.runtimes.train.tiny import corpus, run, settings, tiny_graph

THETA = {"symmetric": True, "train": "levels"}


def trained(graph: Graph, seed: int = 1) -> Graph:
    """Another theta, as a training leaves it."""
    generator = torch.Generator().manual_seed(seed)
    for name in graph.tensors():
        if name.endswith(".theta"):
            theta = graph.tensor(name).detach()
            graph.set_tensor(name, theta + 0.3 * torch.randn(theta.shape, generator=generator))
    return graph


def levels_of(graph: Graph, which: int = 0) -> torch.Tensor:
    return packed_tensors(graph, packed_sites(graph)[which])["lut"]


def test_the_graph_holds_theta_and_computes_the_levels_from_it() -> None:
    graph = packed(bits=2, **THETA)
    lines = [line.strip() for line in str(graph).splitlines() if "up.weight/" in line]
    assert lines[0].startswith("up.weight/levels = qc.monotone_levels(up.weight.theta: f32[2], 1.0)")
    assert "qc.dequantize_lut(up.weight.indices: u8[64, 16], up.weight/levels, 64" in lines[1]
    trains = [name for name, info in graph.tensors().items() if info.trainable]
    assert sorted(trains) == ["down.weight.theta", "up.bias", "up.weight.theta"]
    assert graph.info("up.weight.theta").group == "levels"
    assert "up.weight.lut" not in graph.tensors()


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_every_even_number_of_levels_trains(bits: int) -> None:
    graph = trained(packed(bits=bits, rank=4, **THETA))
    levels = levels_of(graph)
    assert levels.shape == (1 << bits,)
    assert torch.equal(levels.half().float(), levels)
    assert bool((levels.diff() > 0).all())
    assert torch.equal(levels, -levels.flip(0))
    assert bool((levels != 0).all())
    graph(x).square().sum().backward()
    theta = graph.module.get_parameter("up.weight.theta")
    assert theta.grad is not None and bool(theta.grad.abs().max() > 0)


def test_tables_of_several_rows_train_each_for_itself() -> None:
    graph = packed(bits=2, rows_per_lut=16, **THETA)
    assert graph.shape("up.weight.theta") == (4, 2)
    graph(x).square().sum().backward()
    grad = graph.module.get_parameter("up.weight.theta").grad
    assert grad is not None and grad.shape == (4, 2)
    assert levels_of(trained(graph)).shape == (4, 4)


@pytest.mark.parametrize("n", [4, 16, 64, 256])
def test_levels_that_can_train_are_given_back_exactly(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    for _ in range(5):
        theta = 2 * torch.randn(n // 2, generator=generator)
        levels = trainable_levels(monotone_levels(theta))
        assert torch.equal(monotone_levels(theta_of(levels)), levels)


def test_a_bake_stores_the_levels_and_leaves_nothing_of_theta() -> None:
    graph = trained(packed(bits=2, **THETA))
    levels, indices = levels_of(graph), graph.tensor("up.weight.indices").clone()
    before = graph(x)
    apply(Snap(), graph)
    assert graph.dtype_of("up.weight.lut") == torch.float16
    assert torch.equal(graph.tensor("up.weight.lut").float(), levels)
    assert torch.equal(graph.tensor("up.weight.indices"), indices)
    assert not [
        name
        for name, info in graph.tensors().items()
        if name.endswith(".theta") or (info.trainable and name != "up.bias")
    ]
    assert not graph.sites("qc.monotone_levels")
    torch.testing.assert_close(graph(x), before, atol=2e-3, rtol=2e-3)
    text = str(graph)
    assert apply(Snap(), graph).changed == ()
    assert str(graph) == text


def test_with_fp16_rounding_the_trained_graph_computes_the_bits_of_the_baked_one() -> None:
    graph = packed(bits=2, **THETA)
    apply(SteFp16(select=ALL), graph)
    before = trained(graph)(x)
    apply(Snap(), graph)
    assert torch.equal(graph(x), before)


def test_freezing_indices_keeps_theta_to_the_bit() -> None:
    graph = trained(latent(bits=2, rank=4, symmetric=True, train="scales+levels"))
    theta, before = graph.tensor("up.weight.theta").detach().clone(), graph(x)
    apply(FreezeQ(), graph)
    assert torch.equal(graph.tensor("up.weight.theta"), theta)
    assert torch.equal(graph(x), before)
    assert not graph.info("up.weight.theta").trainable
    apply(ConvertScales(), graph)
    assert torch.equal(graph.tensor("up.weight.theta"), theta)
    assert graph.sites("qc.monotone_levels")


def test_other_levels_follow_from_a_theta_of_their_own() -> None:
    graph = trained(packed(bits=4, **THETA))
    apply(Requantize(select=ALL, bits=2), graph)
    assert graph.shape("up.weight.theta") == (2,)
    form = format_of(packed_sites(graph)[0])
    assert getattr(form, "theta", False)
    assert torch.equal(levels_of(graph), -levels_of(graph).flip(0))
    assert graph.info("up.weight.theta").trainable


def test_the_float_weight_is_the_one_that_trained_levels_stood_for() -> None:
    graph = trained(packed(bits=2, **THETA))
    before = graph(x)
    apply(Dequantize(), graph)
    assert torch.equal(graph(x), before)
    assert sorted(graph.tensors()) == ["down.weight", "up.bias", "up.weight"]


# -- levels that train freely ---------------------------------------------------------------------------------------


def crossed() -> Graph:
    graph = packed(bits=2, train="levels")
    graph.set_tensor("up.weight.lut", torch.tensor([-0.9, 0.31, -0.3, 1.07]))
    graph.set_tensor("down.weight.lut", torch.tensor([-1.0, -0.2, -0.2, 1.0]))
    return graph


def test_levels_that_crossed_are_sorted_and_every_weight_keeps_its_own() -> None:
    graph = crossed()
    before = graph(x)
    apply(Snap(), graph)
    up, down = graph.tensor("up.weight.lut"), graph.tensor("down.weight.lut")
    assert up.tolist() == torch.tensor([-0.9, -0.3, 0.31, 1.07]).half().tolist()
    assert down.tolist() == [-1.0, torch.tensor(-0.2).half().item(), pytest.approx(-0.2, abs=2e-4), 1.0]
    assert bool((down.diff() > 0).all())
    torch.testing.assert_close(graph(x), before, atol=5e-3, rtol=5e-3)
    assert apply(Snap(), graph).changed == ()


def test_levels_in_order_leave_the_indices_alone() -> None:
    indices = pack_bits(torch.randint(0, 4, (6, 10), dtype=torch.uint8), 2)
    found, levels = in_order(indices, torch.tensor([-1.0, -0.1, 0.3, 1.0]), 10)
    assert found is indices
    assert torch.equal(levels, torch.tensor([-1.0, -0.1, 0.3, 1.0]).half().float())


@pytest.mark.parametrize("n", [2, 4, 8, 16, 256])
def test_renumbered_indices_stand_for_the_same_levels_in_every_table(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    bits = {2: 1, 4: 2, 8: 3, 16: 4, 256: 8}[n]
    indices = pack_bits(torch.randint(0, n, (12, 7), generator=generator).to(torch.uint8), bits)
    lut = torch.stack([torch.randperm(n, generator=generator) for _ in range(3)]) / 8
    found, levels = in_order(indices, lut, 7)
    assert bool((levels.diff(dim=-1) > 0).all())
    assert torch.equal(look_up(found, levels, 7), look_up(indices, lut, 7))


# -- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("symmetric", "left"), [(True, 0.95), (False, 0.7)])  # two symmetric pairs: one can move
def test_training_levels_alone_comes_nearer_to_what_the_float_weights_gave(symmetric: bool, left: float) -> None:
    graph = packed(bits=2, fit="absmax", levels="uniform", symmetric=symmetric, train="levels")
    torch.manual_seed(0)
    wanted = capture_module(Mlp(), x)(x).detach()
    levels = [p for n, p in graph.module.named_parameters() if p.requires_grad and n != "up.bias"]
    assert len(levels) == 2
    optimizer, losses = torch.optim.Adam(levels, lr=0.02), []
    for _ in range(30):
        loss = (graph(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < left * losses[0]
    apply(Snap(), graph)
    assert float((graph(x) - wanted).square().mean().detach()) == pytest.approx(losses[-1], rel=0.05)


@pytest.mark.parametrize(("symmetric", "suffix"), [(True, "theta"), (False, "lut")])
def test_the_training_runtime_trains_levels_and_gives_them_back(symmetric: bool, suffix: str, tmp_path: Path) -> None:
    graph, teacher = tiny_graph("no such tensor"), tiny_graph()
    options = LutOptions(bits=2, rank=4, group=8, symmetric=symmetric, train="levels")
    QuantizeBase(scheme="lut", select=Selector(role="mlp.*"), lut=options).run(graph)
    graph.verify()
    names = [n for n, info in graph.tensors().items() if info.trainable]
    assert {n.rpartition(".")[2] for n in names} == {suffix}
    before = {n: graph.tensor(n).detach().clone() for n in names}
    chosen = settings(corpus(tmp_path / "text"), steps=2, lr=None, objective=Kd(), groups={"levels": Group(lr=0.02)})
    run(graph, chosen, tmp_path / "train", teacher=teacher)
    assert not any(torch.equal(graph.tensor(n), before[n]) for n in names)


# -- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"bits": 1, "symmetric": True},
            "lut.train is levels, and of two symmetric levels none can move\n"
            "  fix    train the scales, or take lut.symmetric out",
        ),
        (
            {"form": "latent"},
            "lut.train is levels, and latent weights are sorted by levels that stay in order\n"
            "  fix    set lut.symmetric to true",
        ),
        (
            {"symmetric": True, "scale": "none", "rows_per_lut": 16},
            "lut.train is levels, and the tables of lut.rows_per_lut do not end at one largest level\n"
            "  fix    take lut.rows_per_lut or lut.symmetric out, or fit scales: lut.fit mse",
        ),
    ],
)
def test_what_levels_cannot_train_with_is_told(options: dict[str, object], text: str) -> None:
    (problem,) = LutOptions(train="levels", **options).mistakes()  # type: ignore[arg-type]
    assert str(problem) == text


def test_levels_of_latent_weights_do_not_train_freely() -> None:
    graph = latent(bits=2)
    with pytest.raises((QcError, QcErrors)) as caught:
        apply(SetTrainable(groups={"levels": Selector(name="up.weight.lut")}), graph)
    assert str(caught.value) == (
        "up.weight.lut holds levels that latent weights are sorted by, and trained freely they do not stay in order\n"
        "  fix    set lut.train to levels and lut.symmetric to true in quantize-base, or freeze-q first"
    )
