from __future__ import annotations

from typing import Any

import pytest
import torch

from graph import QcError, Selector
from graph.formats import packed_sites
from passes.freeze_ternary import FreezeTernary
from passes.hand_off import HandOff
from passes.requantize_ternary import RequantizeTernary
from passes.runner import apply
from tests.passes.lut_models import ALL, x
from tests.passes.ternary_models import frozen, latent

LATENT = "qc.fake_quantize_ternary(up.weight.latent: f32[64, 64], model, dead-zone, 0.05, absmean, 64)"


def trained(graph: Any) -> dict[str, str | None]:
    return {name: info.group for name, info in graph.tensors().items() if info.trainable and not name.endswith("bias")}


def test_floats_begin_as_the_packed_weights_and_train() -> None:
    graph, wanted = frozen(), frozen()
    report = apply(HandOff(select=ALL), graph)
    assert report.changed == ("up.weight/dequantize", "down.weight/dequantize", "up", "down")
    assert trained(graph) == {"up.weight": "weights", "down.weight": "weights"}
    assert "up.weight_ternary_scale" in graph.tensors() and not packed_sites(graph)
    assert graph(x).equal(wanted(x))


@pytest.mark.parametrize(
    "options", [{}, {"rule": "round-clip"}, {"granularity": "group", "group": 16}, {"granularity": "tensor"}]
)
def test_latent_weights_begin_as_the_packed_ones_and_freeze_to_the_same_integers(options: dict[str, Any]) -> None:
    graph, wanted = frozen(**options), frozen(**options)
    rule = {key: value for key, value in options.items() if key == "rule"}
    apply(HandOff(select=ALL, form="ste_latent", **rule), graph)
    if not options:
        assert LATENT in str(graph)
    assert trained(graph) == {"up.weight.latent": "weights", "down.weight.latent": "weights"}
    torch.testing.assert_close(graph(x), wanted(x), rtol=1e-5, atol=1e-6)
    apply(FreezeTernary(), graph)
    assert graph.tensor("up.weight.indices").equal(wanted.tensor("up.weight.indices"))
    assert graph.tensor("up.weight.scale").equal(wanted.tensor("up.weight.scale"))


def test_lora_trains_beside_integers_that_stay() -> None:
    graph, wanted = frozen(), frozen()
    apply(HandOff(select=ALL, form="lora_on_ternary", rank=2, alpha=4), graph)
    assert set(trained(graph).values()) == {"lora.default"}
    assert graph.tensor("up.weight.indices").equal(wanted.tensor("up.weight.indices"))
    assert graph(x).equal(wanted(x))


def test_what_was_handed_over_as_floats_comes_back_with_its_scales() -> None:
    graph, wanted = frozen(), frozen()
    apply(HandOff(select=ALL), graph)
    apply(RequantizeTernary(select=ALL), graph)
    apply(FreezeTernary(), graph)
    assert graph.tensor("up.weight.indices").equal(wanted.tensor("up.weight.indices"))
    assert graph.tensor("up.weight.scale").equal(wanted.tensor("up.weight.scale"))


def test_each_mistake_is_told_with_its_fix() -> None:
    def message(graph: Any, **options: Any) -> str:
        with pytest.raises(QcError) as caught:
            apply(HandOff(**{"select": ALL, **options}), graph)
        return str(caught.value)

    assert message(frozen(), rank=4) == (
        "rank belongs to the form lora_on_ternary\n  fix    take rank out, or set form to lora_on_ternary"
    )
    assert message(frozen(), tau=0.3) == (
        "tau belongs to the form ste_latent\n  fix    take tau out, or set form to ste_latent"
    )
    assert message(latent(), select=Selector(name="up")) == (
        "the weight is not packed as ternary\n  site   up\n  fix    run freeze-ternary first, or exclude it from select"
    )
