from __future__ import annotations

from typing import Any

import pytest
import torch

from graph import Graph, QcError
from graph.formats import Ternary, format_of, packed_sites
from graph.formats.trits import unpack_trits
from passes.add_lora import AddLora
from passes.dequantize import Dequantize
from passes.freeze_ternary import FreezeTernary
from passes.runner import apply
from tests.passes.lut_models import ALL, x
from tests.passes.ternary_models import frozen, latent

BEFORE = (
    "up.weight/fake_quantize = qc.fake_quantize_ternary(up.weight.latent: f32[64, 64], model, dead-zone, 0.05, "
    "absmean, 64) : f32[64, 64]"
)
AFTER = {
    "2bit": "up.weight/dequantize = qc.dequantize_ternary(up.weight.indices: u8[64, 16], up.weight.scale: f16[64, 1], "
    "64, 2bit, model) : f32[64, 64]",
    "trit5": "up.weight/dequantize = qc.dequantize_ternary(up.weight.indices: u8[64, 13], up.weight.scale: f16[64, 1], "
    "64, trit5, model) : f32[64, 64]",
}


@pytest.mark.parametrize("packing", ["2bit", "trit5"])
def test_integers_and_scales_take_the_place_of_latent_floats(packing: Any) -> None:
    graph = latent()
    assert BEFORE in str(graph)
    wanted = graph(x)
    report = apply(FreezeTernary(packing=packing), graph)
    assert AFTER[packing] in str(graph)
    torch.testing.assert_close(graph(x), wanted, atol=1e-3, rtol=0)
    assert "up.weight.latent" not in graph.tensors()
    assert not any(info.trainable for name, info in graph.tensors().items() if ".weight." in name)
    assert report.figures["bits_per_weight"] == {"2bit": 2.25, "trit5": 1.875}[packing]
    trits = unpack_trits(graph.tensor("up.weight.indices"), packing, 64)
    assert trits.unique().tolist() == [0, 1, 2], "the integers, not scaled values cast to integers"


@pytest.mark.parametrize("options", [{}, {"rule": "round-clip"}, {"scale": "least-squares"}, {"granularity": "tensor"}])
@pytest.mark.parametrize("train", ["weights", "weights+scales"])
def test_with_scales_in_fp32_every_value_stays(options: dict[str, Any], train: str) -> None:
    graph = latent(train=train, **options)
    wanted = graph(x)
    apply(FreezeTernary(scale_dtype="fp32"), graph)
    assert graph(x).equal(wanted)


def test_a_weight_that_has_moved_is_frozen_where_it_is_now() -> None:
    graph = latent()
    graph.set_tensor("up.weight.latent", graph.tensor("up.weight.latent").detach().roll(1, 0))
    wanted = graph(x)
    apply(FreezeTernary(scale_dtype="fp32"), graph)
    assert graph(x).equal(wanted)


def test_a_second_run_says_that_nothing_is_left() -> None:
    graph = frozen()
    with pytest.raises(QcError) as caught:
        apply(FreezeTernary(), graph)
    assert str(caught.value) == (
        "select {} matches no site\n  fix    the graph has none at this point; take the pass out or move it"
    )


def test_scales_that_train_are_fp32() -> None:
    with pytest.raises(QcError) as caught:
        apply(FreezeTernary(train="scales"), latent())
    assert str(caught.value) == (
        "scales in fp16 do not train\n  fix    set scale_dtype to fp32, and snap them afterwards"
    )
    graph = latent()
    apply(FreezeTernary(train="scales", scale_dtype="fp32"), graph)
    assert [n for n, i in graph.tensors().items() if i.trainable and i.group == "scales"] == [
        "up.weight.scale",
        "down.weight.scale",
    ]


def test_frozen_weights_pass_gradients_to_adapters() -> None:
    graph = frozen()
    apply(AddLora(rank=2, select=ALL), graph)
    trained = [name for name, info in graph.tensors().items() if info.trainable]
    for name in trained:
        if ".lora_B." in name:
            graph.set_tensor(name, torch.ones_like(graph.tensor(name).detach()))
    graph = _requiring(graph, trained)
    grads = torch.autograd.grad(graph(x).square().sum(), [graph.tensor(name) for name in trained])
    assert len(trained) == 4 and all(grad.isfinite().all() and grad.count_nonzero() for grad in grads)


def _requiring(graph: Graph, names: list[str]) -> Graph:
    for name in names:
        graph.set_info(name, trainable=True)
    return graph


def test_dequantized_weights_are_those_of_the_integers_and_latent_ones_are_refused() -> None:
    graph = latent()
    with pytest.raises(QcError) as caught:
        apply(Dequantize(), graph)
    assert "up.weight is latent: no integers of it are stored" in str(caught.value)
    assert "fix    run freeze-ternary first" in str(caught.value)
    apply(FreezeTernary(), graph)
    wanted = graph(x)
    apply(Dequantize(), graph)
    assert graph(x).equal(wanted)
    assert graph.tensor("up.weight")[0].unique().numel() == 3
    assert graph.tensor("up.weight_ternary_scale").dtype == torch.float16
    assert not packed_sites(graph)


def test_the_latent_weights_of_a_trained_model_are_not_what_it_computes_with() -> None:
    """Agreement of the largest output: that of the true export is whole, that of one of latent weights is not."""
    graph = latent()
    noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    graph.set_tensor("up.weight.latent", graph.tensor("up.weight.latent").detach() + 0.2 * noise)
    probe = torch.randn(8, 64, generator=torch.Generator().manual_seed(4))
    wanted, latents = graph(probe), {n: graph.tensor(f"{n}.weight.latent").detach().clone() for n in ("up", "down")}
    apply(FreezeTernary(), graph)
    apply(Dequantize(), graph)

    def update(made: torch.Tensor) -> torch.Tensor:
        return (made - probe).argmax(-1)

    assert (update(graph(probe)) == update(wanted)).float().mean() >= 0.995
    for name, value in latents.items():
        graph.set_tensor(f"{name}.weight", value)
    assert (update(graph(probe)) == update(wanted)).float().mean() < 0.995


def test_the_format_says_what_it_is() -> None:
    graph = frozen("trit5", granularity="tensor")
    (site, _) = packed_sites(graph)
    form = format_of(site)
    assert isinstance(form, Ternary) and (form.packing, form.baked, form.name) == ("trit5", True, "ternary, one scale")
