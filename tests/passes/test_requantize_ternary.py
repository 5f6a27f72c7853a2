from __future__ import annotations

from typing import Any

import pytest
import torch

from graph import QcError, Selector
from graph.formats import dense_value, packed_sites
from passes.freeze_ternary import FreezeTernary
from passes.requantize_ternary import RequantizeTernary
from passes.runner import apply
from tests.passes.lut_models import ALL, x
from tests.passes.ternary_models import floats, frozen, plain

KEPT = "up.weight: f32[64, 64]"
AFTER = (
    "up.weight/fake_quantize = qc.fake_quantize_ternary(up.weight.latent: f32[64, 64], model, dead-zone, 0.05, "
    "absmean, 64) : f32[64, 64]"
)


def test_float_weights_are_ternary_again() -> None:
    graph = floats()
    assert KEPT in str(graph) and "up.weight_ternary_scale" in graph.tensors()
    report = apply(RequantizeTernary(select=ALL), graph)
    assert AFTER in str(graph)
    assert report.changed == ("up", "down")
    assert not any(name.endswith("_ternary_scale") for name in graph.tensors())
    before = str(graph)
    assert apply(RequantizeTernary(select=ALL), graph).changed == ()
    assert str(graph) == before


@pytest.mark.parametrize("options", [{}, {"rule": "round-clip"}, {"granularity": "tensor"}, {"tau": 1.0}])
def test_a_round_trip_without_training_gives_the_same_bytes_back(options: dict[str, Any]) -> None:
    wanted = frozen(**options)
    graph = floats(**options)
    apply(RequantizeTernary(select=ALL, **options), graph)
    apply(FreezeTernary(), graph)
    for suffix in ("indices", "scale"):
        assert graph.tensor(f"up.weight.{suffix}").equal(wanted.tensor(f"up.weight.{suffix}"))
    assert graph(x).equal(wanted(x))


def test_the_naive_way_shrinks_the_scale_by_the_share_of_zeros_and_stands_beside_it() -> None:
    graph = floats(rule="round-clip")
    w = graph.tensor("up.weight").detach()
    report = apply(RequantizeTernary(select=ALL, rule="round-clip", start="plain"), graph)
    made = dense_value(graph, packed_sites(graph)[0])
    share = (w != 0).float().mean(-1, keepdim=True)
    torch.testing.assert_close(made, w * share)
    assert report.figures["worst_error_stored"] == report.figures["worst_error_least_squares"] == 0.0
    assert float(report.figures["worst_error_absmean"]) > 0.2


def test_after_training_the_stored_scale_is_nearer_than_the_mean_found_anew() -> None:
    graph = floats(rule="round-clip")
    noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    graph.set_tensor("up.weight", graph.tensor("up.weight").detach() + 0.005 * noise)
    figures = apply(RequantizeTernary(select=ALL, rule="round-clip"), graph).figures
    assert 0 < float(figures["worst_error_stored"]) < float(figures["worst_error_absmean"])


def test_what_cannot_begin_again_is_named() -> None:
    def message(graph: Any, **options: Any) -> str:
        with pytest.raises(QcError) as caught:
            apply(RequantizeTernary(select=Selector(name="up"), **options), graph)
        return str(caught.value)

    assert message(plain()) == (
        "no ternary scale of up.weight is stored\n  site   up\n  fix    run ternary-ste, or exclude it from select"
    )
    assert message(floats(), granularity="tensor") == (
        "up.weight had scales [64, 1], which granularity tensor has not\n"
        "  site   up\n  fix    set granularity to what the weight had"
    )
    assert message(floats(), scale="least-squares") == (
        "start is stored, and a scale of least-squares would be another\n  fix    take scale out, or set start to plain"
    )
