"""quantize-base with lut.vector: the picture, a second run, the numbers, what trains, and the passes behind it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graph import Graph, QcError, Selector, capture_module
from graph.formats import LutOptions, VectorLut, dense_value, format_of, fuse_dequantize, packed_sites
from graph.moments import COVARIANCE, keep_moments
from passes.convert_scales import ConvertScales
from passes.dequantize import Dequantize
from passes.freeze_q import FreezeQ
from passes.keeping import Keep
from passes.quantize_base import QuantizeBase
from passes.requantize import Requantize
from passes.runner import apply
from passes.set_trainable import SetTrainable
from passes.snap import Snap
from passes.ste_fp16 import SteFp16
from tests.passes.lut_models import ALL, Mlp, x
from tests.passes.test_quantize_lut import BEFORE
from tests.passes.test_quantize_lut import Mlp as Narrow
from tests.rewrites import assert_rewrites

PAIRS: dict[str, Any] = {"bits": 4, "vector": 2, "scale": "channel"}


def vectors(**options: Any) -> QuantizeBase:
    return QuantizeBase(select=ALL, scheme="lut", lut=LutOptions(**(PAIRS | options)))


def packed(**options: Any) -> Graph:
    """The net on sixteen pairs, unless told otherwise."""
    torch.manual_seed(0)
    graph = capture_module(Mlp(), x)
    apply(vectors(**options), graph)
    return graph


def latent(**options: Any) -> Graph:
    return packed(form="latent", **({"train": "weights"} | options))


def trained(graph: Graph) -> dict[str, str | None]:
    return {name: info.group for name, info in graph.tensors().items() if info.trainable and name != "up.bias"}


def train(graph: Graph, steps: int = 3, lr: float = 1e-2) -> list[float]:
    """The losses of a few steps towards other outputs, with linears fused as in training."""
    fuse_dequantize(graph)
    leaves = [graph.tensor(name) for name in trained(graph)]
    optimizer, wanted = torch.optim.SGD(leaves, lr=lr), 2 * x.roll(1, 1)
    losses = []
    for _ in range(steps):
        loss = (graph(x) - wanted).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


# -- the picture ----------------------------------------------------------------------------------------------------

PACKED = """
    x: f32[3, 32]
    up.weight/dequantize = qc.dequantize_vector_lut(up.weight.indices: u8[32, 16], up.weight.lut: f32[16, 2], 32, model, scale=up.weight.scale: f32[64, 1]) : f32[64, 32]
    up = linear(x, up.weight/dequantize, up.bias: f32[64]) : f32[3, 64]
    relu = relu(up) : f32[3, 64]
    down = linear(relu, down.weight: f32[32, 64]) : f32[3, 32]
    add = add.Tensor(x, down) : f32[3, 32]
    return add
"""
LATENT = """
    x: f32[3, 32]
    up.weight/fake_quantize = qc.fake_quantize_vector_lut(up.weight.latent: f32[64, 32], up.weight.lut: f32[16, 2], model, scale=up.weight.scale: f32[64, 1]) : f32[64, 32]
    up = linear(x, up.weight/fake_quantize, up.bias: f32[64]) : f32[3, 64]
    relu = relu(up) : f32[3, 64]
    down = linear(relu, down.weight: f32[32, 64]) : f32[3, 32]
    add = add.Tensor(x, down) : f32[3, 32]
    return add
"""


@pytest.mark.parametrize(("form", "after"), [("factored", PACKED), ("latent", LATENT)])
def test_a_selected_linear_reads_vectors_times_scales(form: Any, after: str) -> None:
    step = QuantizeBase(scheme="lut", select=Selector(name="up"), lut=LutOptions(**PAIRS, form=form))
    assert_rewrites(step, Narrow(), torch.randn(3, 32), before=BEFORE, after=after)


def test_a_second_run_changes_nothing() -> None:
    graph = packed()
    before = {name: graph.tensor(name).clone() for name in graph.tensors()}
    assert not apply(vectors(), graph).changed
    assert all(graph.tensor(name).equal(value) for name, value in before.items())


# -- the numbers ----------------------------------------------------------------------------------------------------


def test_two_bits_a_weight_and_what_the_table_and_the_scales_take() -> None:
    torch.manual_seed(0)
    graph = capture_module(Mlp(), x)
    found = apply(vectors(), graph).figures
    assert found["bytes_once_baked"] == 2 * (64 * 64 * 2 // 8 + 2 * (16 * 2 + 64))
    assert found["bits_per_weight_once_baked"] == 2.375
    assert 12 < float(found["worst_snr_db"]) < 13 and found["scales_not_positive"] == 0.0


@pytest.mark.parametrize("scale", ["channel", "none"])
@pytest.mark.parametrize(("bits", "width"), [(2, 2), (4, 4), (6, 4), (4, 16)])
def test_every_size_of_table_is_packed_and_unpacked(bits: Any, width: Any, scale: Any) -> None:
    graph = packed(bits=bits, vector=width, scale=scale, train="none")
    site = packed_sites(graph)[0]
    assert format_of(site) == VectorLut(columns=64, levels=1 << bits, vector=width, scale=scale)
    dense, twin = dense_value(graph, site), graph.copy()
    apply(Dequantize(select=ALL), twin)
    assert twin.tensor("up.weight").equal(dense) and twin(x).equal(graph(x))


def test_calibrated_inputs_and_their_covariance_are_used() -> None:
    def error(*suffixes: str) -> float:
        torch.manual_seed(0)
        graph = capture_module(Mlp(), x)
        up = next(site for site in graph.sites("aten.linear") if site.name == "up")
        inputs = torch.randn(256, 64, generator=torch.Generator().manual_seed(3)) * torch.linspace(0.1, 3, 64)
        inputs = inputs @ (torch.eye(64) + 0.3 * torch.randn(64, 64, generator=torch.Generator().manual_seed(4)))
        covariance, w = inputs.t() @ inputs / 256, graph.tensor("up.weight").detach().clone()
        for suffix in suffixes:
            value = covariance if suffix == COVARIANCE else covariance.diagonal().contiguous()
            keep_moments(graph, "up.weight", up, value, suffix)
        apply(QuantizeBase(select=Selector(name="up"), scheme="lut", lut=LutOptions(**PAIRS)), graph, check=False)
        off = dense_value(graph, packed_sites(graph)[0]) - w
        return float(((off @ covariance) * off).sum())

    plain, weighed, fed = error(), error("_moments"), error("_moments", COVARIANCE)
    assert fed < weighed < plain


def test_latent_vectors_have_no_use_for_a_covariance() -> None:
    torch.manual_seed(0)
    graph = capture_module(Mlp(), x)
    up = next(site for site in graph.sites("aten.linear") if site.name == "up")
    keep_moments(graph, "up.weight", up, torch.eye(64), COVARIANCE)
    with pytest.raises(QcError) as caught:
        apply(vectors(form="latent", train="weights"), graph)
    assert str(caught.value) == (
        "calibrate measured the covariance of what reads up.weight, and a latent weight is rounded to the nearest at"
        " every step\n  site   up\n  fix    take covariance out of this calibrate"
    )


def test_a_budget_counts_what_vectors_take() -> None:
    torch.manual_seed(0)
    graph = capture_module(Mlp(), x)
    for site in graph.sites("aten.linear"):
        keep_moments(graph, f"{site.name}.weight", site, torch.ones(64))
    step = QuantizeBase(select=ALL, scheme="lut", lut=LutOptions(**PAIRS), keep=Keep(bits=9.5))
    report = apply(step, graph, check=False)
    assert [one.weight for one in report.weighed if one.kept] and len(packed_sites(graph)) == 1


# -- what trains ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "groups"),
    [
        ({}, {"scale": "scales"}),
        ({"train": "levels"}, {"lut": "levels"}),
        ({"train": "scales+levels"}, {"lut": "levels", "scale": "scales"}),
        ({"train": "none"}, {}),
        ({"form": "latent", "train": "weights"}, {"latent": "weights"}),
        ({"form": "latent", "train": "scales+levels"}, {"lut": "levels", "scale": "scales"}),
    ],
)
def test_what_is_said_trains_and_lowers_the_loss(options: dict[str, Any], groups: dict[str, str]) -> None:
    graph = packed(**options)
    before = {name: graph.tensor(name).detach().clone() for name in graph.tensors()}
    assert {name.rpartition(".")[2]: group for name, group in trained(graph).items()} == groups
    if not groups:
        return
    losses = train(graph)
    assert losses[-1] < losses[0]
    moved = {name for name, value in before.items() if not graph.tensor(name).equal(value)}
    assert moved == set(trained(graph))


def test_the_table_of_latent_vectors_may_train_with_them() -> None:
    graph = latent()
    apply(SetTrainable(select=Selector(name=("*.lut", "*.latent", "*.scale"))), graph, check=False)
    assert {name.rpartition(".")[2] for name in trained(graph)} == {"lut", "latent", "scale"}
    losses = train(graph)
    assert losses[-1] < losses[0]


# -- the passes behind it -------------------------------------------------------------------------------------------


def test_freezing_keeps_every_value_and_drops_the_floats() -> None:
    graph = latent()
    train(graph.copy(), lr=0.5)
    before = graph(x)
    report = apply(FreezeQ(select=ALL), graph)
    assert graph(x).equal(before) and "up.weight/dequantize" in report.changed
    assert not [name for name in graph.tensors() if name.endswith(".latent")]
    assert trained(graph) == dict.fromkeys(("up.weight.scale", "down.weight.scale"), "scales")


@pytest.mark.parametrize("scale", ["channel", "none"])
def test_what_trained_in_fp16_is_what_is_snapped(scale: Any) -> None:
    graph = packed(train="levels", scale=scale)
    apply(SteFp16(select=ALL), graph)
    for name in trained(graph):
        graph.set_tensor(name, graph.tensor(name).detach() * 1.01)
    indices, before = graph.tensor("up.weight.indices").clone(), graph(x)
    apply(Snap(select=ALL), graph, check=False)
    assert graph(x).equal(before) and graph.tensor("up.weight.indices").equal(indices)
    assert graph.tensor("up.weight.lut").dtype == torch.float16 and not trained(graph)
    assert not apply(Snap(select=ALL), graph, check=False).changed


@pytest.mark.parametrize(
    ("step", "what"),
    [
        (ConvertScales(select=Selector(name="up*")), "up.weight has channel scales, not low-rank ones"),
        (Requantize(select=Selector(name="up*")), "up.weight is on vectors, which are not refitted"),
    ],
)
def test_passes_over_low_rank_scales_refuse_vectors(step: Any, what: str) -> None:
    with pytest.raises(QcError) as caught:
        apply(step, packed())
    assert str(caught.value) == f"{what}\n  site   up.weight/dequantize\n  fix    exclude it from select"


def test_scales_that_are_not_positive_are_counted() -> None:
    graph = packed()
    scale = graph.tensor("up.weight.scale").detach().clone()
    scale[:3] *= -1
    form, sides = VectorLut(columns=64, levels=16, vector=2), {"scale": scale}
    assert form.scales_below(sides) == 3 * 64
