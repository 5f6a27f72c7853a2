from __future__ import annotations

import pytest
import torch

from graph import QcError, Selector
from graph.formats import packed_sites
from passes.freeze_q import FreezeQ
from passes.runner import apply
from tests.passes.lut_models import latent, packed, x

BEFORE = (
    "up.weight/fake_quantize = qc.fake_quantize_lut(up.weight.latent: f32[64, 64], up.weight.lut: f32[16], model, "
    "scale_a=up.weight.scale_a: f32[64, 4], scale_b=up.weight.scale_b: f32[4, 64], floor=1e-08) : f32[64, 64]"
)
AFTER = (
    "up.weight/dequantize = qc.dequantize_lut(up.weight.indices: u8[64, 32], up.weight.lut: f32[16], 64, model, "
    "scale_a=up.weight.scale_a: f32[64, 4], scale_b=up.weight.scale_b: f32[4, 64], floor=1e-08) : f32[64, 64]"
)


def test_indices_take_the_place_of_latent_floats_and_every_value_stays() -> None:
    graph = latent()
    assert BEFORE in str(graph)
    wanted = graph(x)
    report = apply(FreezeQ(), graph)
    assert AFTER in str(graph)
    assert graph(x).equal(wanted)
    assert report.figures == {"weights": 2}
    assert "up.weight.latent" not in graph.tensors()


@pytest.mark.parametrize(("train", "trained"), [("scales", ["scale_a", "scale_b"]), ("none", [])])
def test_from_then_on_the_scales_train_or_nothing(train: str, trained: list[str]) -> None:
    graph = latent()
    apply(FreezeQ(train=train), graph)  # type: ignore[arg-type]
    flags = {n.partition(".weight.")[2] for n, i in graph.tensors().items() if i.trainable and ".weight." in n}
    assert flags == set(trained)
    assert not any(info.trainable for name, info in graph.tensors().items() if name.endswith("indices"))


def test_a_moved_latent_weight_is_frozen_where_it_is_now() -> None:
    graph = latent()
    moved = graph.tensor("up.weight.latent") + 0.05 * torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    graph.set_tensor("up.weight.latent", moved)
    wanted = graph(x)
    apply(FreezeQ(), graph)
    assert graph(x).equal(wanted)


def test_a_second_run_says_that_nothing_is_left() -> None:
    graph = latent()
    apply(FreezeQ(), graph)
    with pytest.raises(QcError) as caught:
        apply(FreezeQ(), graph)
    assert str(caught.value) == (
        "select {} matches no site\n  fix    the graph has none at this point; take the pass out or move it"
    )


def test_only_the_selected_weights_are_frozen() -> None:
    graph = latent()
    wanted = graph(x)
    apply(FreezeQ(select=Selector(name="up.*")), graph)
    assert [site.op for site in packed_sites(graph)] == ["qc.dequantize_lut", "qc.fake_quantize_lut"]
    assert graph(x).equal(wanted)
    assert all(site.op == "qc.dequantize_lut" for site in packed_sites(packed()))
