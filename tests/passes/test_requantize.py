from __future__ import annotations

import pytest
import torch

from graph import Graph, QcError, Selector
from graph.formats import dense_value, packed_sites
from graph.formats.levels import fit_levels, nearest
from passes.requantize import Requantize
from passes.runner import apply
from passes.snap import Snap
from tests.passes.lut_models import ALL, latent, packed, x


def up(graph: Graph) -> torch.Tensor:
    return dense_value(graph, packed_sites(graph)[0])


def test_the_selected_weight_gets_fewer_levels_and_more_ranks_and_no_other_moves() -> None:
    graph = packed()
    others = {n: graph.tensor(n).clone() for n in graph.tensors() if n.startswith("down")}
    report = apply(Requantize(select=Selector(name="up.*"), bits=2, rank=4), graph)
    assert "up.weight.indices: u8[64, 16], up.weight.lut: f32[4]" in str(graph)
    assert report.figures["weights"] == 1
    assert all(graph.tensor(name).equal(value) for name, value in others.items())
    assert graph(x).isfinite().all()


def test_more_ranks_alone_change_no_scale() -> None:
    graph = packed()
    was = up(graph)
    apply(Requantize(select=ALL, bits=4, rank=8, scales="keep"), graph)
    assert graph.tensor("up.weight.scale_g").shape == (8,)
    assert graph.tensor("up.weight.scale_g")[4:].count_nonzero() == 0
    scale = graph.tensor("up.weight.scale_a") * graph.tensor("up.weight.scale_g") @ graph.tensor("up.weight.scale_b")
    old = packed()
    before = old.tensor("up.weight.scale_a") * old.tensor("up.weight.scale_g") @ old.tensor("up.weight.scale_b")
    assert (scale - before).abs().max() <= 1e-4 * before.abs().max()
    assert (up(graph) - was).norm() < 0.05 * was.norm(), "16 levels again, fitted to weights that lie on 16"


def test_levels_are_within_3_percent_of_the_best_for_the_scales_that_there_are() -> None:
    graph, old = packed(), packed()
    w = up(old)
    s = old.tensor("up.weight.scale_a") * old.tensor("up.weight.scale_g") @ old.tensor("up.weight.scale_b")
    apply(Requantize(select=ALL, bits=2, scales="keep"), graph)
    best = fit_levels(w / s, 4, s.square(), zero_free=True)
    least = (best[nearest(w / s, best).long()] * s - w).norm()
    assert (up(graph) - w).norm() <= 1.03 * least


def test_refitted_scales_are_nearer_than_kept_ones() -> None:
    kept, refitted, was = packed(), packed(), up(packed())
    apply(Requantize(select=ALL, bits=2, rank=4, scales="keep"), kept)
    apply(Requantize(select=ALL, bits=2, rank=4), refitted)
    assert (up(refitted) - was).norm() < (up(kept) - was).norm()


def test_groups_of_rows_keep_levels_of_their_own() -> None:
    graph, was = packed(rows_per_lut=16), up(packed(rows_per_lut=16))
    one, only = packed(), up(packed())
    apply(Requantize(select=ALL, bits=2, rank=6), graph)
    apply(Requantize(select=ALL, bits=2, rank=6), one)
    assert graph.shape("up.weight.lut") == (4, 4)
    assert graph.tensor("up.weight.lut").unique(dim=0).shape[0] == 4, "each fitted to its own rows"
    assert (up(graph) - was).norm() / was.norm() < (up(one) - only).norm() / only.norm()


def test_it_says_what_it_needs() -> None:
    for graph, options, wanted in (
        (latent(train="scales"), {}, None),
        (packed(), {"rank": 2}, ("rank 2 is less than the 4 that up.weight has", "set rank to 4 or more")),
        (packed(scale="none", rank=None, group=None, train="none"), {}, (
            "up.weight has no magnitudes in its scales", "run convert-scales first")),
    ):  # fmt: skip
        with pytest.raises(QcError) as caught:
            apply(Requantize(select=ALL, **options), graph)  # type: ignore[arg-type]
        if wanted is not None:
            what, fix = wanted
            assert f"{what}\n" in str(caught.value)
            assert f"  fix    {fix}" in str(caught.value)
    graph = packed()
    apply(Snap(select=Selector(name="*.weight.*")), graph)
    with pytest.raises(QcError, match=r"up\.weight is baked"):
        apply(Requantize(select=ALL), graph)
