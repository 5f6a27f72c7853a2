from __future__ import annotations

from typing import Literal

import pytest
import torch

from graph import Graph, QcError
from graph.formats import dense_value, packed_sites
from passes.convert_scales import ConvertScales
from passes.freeze_q import FreezeQ
from passes.runner import apply
from tests.passes.lut_models import latent, packed, sink, x

AFTER = (
    "up.weight/dequantize = qc.dequantize_lut(up.weight.indices: u8[64, 32], up.weight.lut: f32[16], 64, model, "
    "scale_a=up.weight.scale_a: f32[64, 4], scale_b=up.weight.scale_b: f32[4, 64], scale_g=up.weight.scale_g: f32[4]"
    ") : f32[64, 64]"
)


def up(graph: Graph) -> torch.Tensor:
    return dense_value(graph, packed_sites(graph)[0])


def test_scales_get_magnitudes_of_their_own_and_the_same_indices() -> None:
    graph = latent()
    wanted = graph(x)
    indices = latent()
    apply(FreezeQ(), indices)
    report = apply(ConvertScales(), graph)
    assert AFTER in str(graph)
    torch.testing.assert_close(graph(x), wanted, atol=1e-6, rtol=1e-6)
    assert graph.tensor("up.weight.indices").equal(indices.tensor("up.weight.indices"))
    assert report.figures["worst_share_not_positive"] == 0
    a, b = graph.tensor("up.weight.scale_a"), graph.tensor("up.weight.scale_b")
    torch.testing.assert_close(a.norm(dim=0), torch.ones(4))
    torch.testing.assert_close(b.norm(dim=1), torch.ones(4))
    trained = {name for name, info in graph.tensors().items() if info.trainable and ".weight." in name}
    assert trained == {f"{w}.weight.scale_{s}" for w in ("up", "down") for s in "abg"}


def test_a_second_run_changes_nothing() -> None:
    graph = latent()
    apply(ConvertScales(), graph)
    before = str(graph)
    assert apply(ConvertScales(), graph).changed == ()
    assert str(graph) == before


def test_where_scales_are_negative_refitting_comes_nearer_than_keeping_the_product() -> None:
    errors = {}
    remedies: tuple[Literal["refit", "keep"], ...] = ("refit", "keep")
    for remedy in remedies:
        graph = sink(latent(train="scales"))
        was = up(graph)
        report = ConvertScales(negative=remedy).run(graph)
        graph.verify()
        share = report.figures["worst_share_not_positive"]
        assert isinstance(share, float) and 0.02 < share < 0.1, "four rows of 64, about"
        errors[remedy] = ((up(graph) - was).norm() / was.norm()).item()
        assert errors[remedy] == pytest.approx(report.figures["worst_error"], rel=1e-4)
    assert errors["refit"] < 0.5 * errors["keep"]
    assert errors["refit"] < 0.15, "the bound that the pass keeps: 10 dB is 0.32"


def test_frozen_and_latent_weights_are_converted_alike() -> None:
    first, second = latent(), latent()
    apply(FreezeQ(), first)
    apply(ConvertScales(), first)
    apply(ConvertScales(), second)
    assert first(x).equal(second(x))


def test_scales_that_are_of_no_rank_are_an_error() -> None:
    graph = packed(scale="group", rank=None, train="none")
    with pytest.raises(QcError) as caught:
        apply(ConvertScales(), graph)
    assert "up.weight has group scales, not low-rank ones\n" in str(caught.value)
    assert "  fix    exclude it from select" in str(caught.value)
