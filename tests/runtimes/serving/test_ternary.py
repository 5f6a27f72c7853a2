"""Ternary weights in two bits: the library unpacks what the graph holds, and what has no such form is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from graph import Graph, QcError
from graph.formats import dense_value, packed_sites, weight_name
from graph.weights import read_header
from passes.freeze_ternary import FreezeTernary
from passes.runner import apply
from passes.ternary_ste import TernarySte
from runtimes.export import obstacles
from runtimes.verify import verify
from tests.runtimes.serving.models import Case, exported, graph, same_process

__all__ = ["same_process"]


def frozen(packing: Any = "2bit", **options: Any) -> Graph:
    made = graph()
    apply(TernarySte(scale="least-squares", tau=0.7, **options), made, check=False)
    apply(FreezeTernary(packing=packing), made, check=False)
    return made


def latent() -> Graph:
    made = graph()
    apply(TernarySte(), made, check=False)
    return made


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize(
    ("options", "packing", "strategy"),
    [
        ({}, "2bit", "channel"),
        ({"granularity": "group", "group": 32}, "trit5", "group"),
        ({"granularity": "tensor"}, "2bit", "tensor"),
    ],
    ids=["channel", "group", "tensor"],
)
def test_the_library_unpacks_what_the_graph_holds(
    options: dict[str, Any], packing: str, strategy: str, tmp_path: Path
) -> None:
    packed = frozen(packing, **options)
    out = exported(tmp_path / "out", Case("int2"), packed)
    found = verify(out, packed)
    assert found.passed, found.table()
    assert found.figures()["max_difference"] == 0.0
    assert f'"strategy": "{strategy}"' in (out / "config.json").read_text()


def test_sixteen_lie_in_a_word_the_first_in_its_lowest_bits(tmp_path: Path) -> None:
    packed = frozen()
    out = exported(tmp_path / "out", Case("int2"), packed)
    stored = read_header(out / "model.safetensors")
    for site in packed_sites(packed):
        module = weight_name(site).removesuffix(".weight")
        words, scale = (stored[f"{module}.{key}"].load() for key in ("weight_packed", "weight_scale"))
        fields = torch.stack([words >> shift & 3 for shift in range(0, 32, 2)], dim=-1).flatten(1) - 2
        assert set(fields.unique().tolist()) <= {-1, 0, 1}
        assert (fields.float() * scale.float()).equal(dense_value(packed, site, torch.float32))


def mixed() -> Graph:
    from graph import Selector

    made = graph()
    apply(TernarySte(select=Selector(role="mlp.*")), made, check=False)
    apply(TernarySte(select=Selector(role="attn.*"), granularity="group", group=64), made, check=False)
    apply(FreezeTernary(), made, check=False)
    return made


def said(made: Graph, target: str = "int2") -> list[str]:
    found: list[QcError] = obstacles(target, made, "fp16", {})
    return [f"{error.what} | {error.fix}" for error in found]


def test_what_has_no_such_form_is_told_before_anything_is_written() -> None:
    first = "model.layers.0.self_attn.q_proj.weight"
    assert said(graph()) == ["the graph has no ternary weights | add ternary-ste and freeze-ternary, or export to int4"]
    assert said(latent()) == [
        f"{first} is a float weight that is packed anew each time it is read"
        " | add the pass freeze-ternary before the export"
    ]
    assert said(frozen(act_bits=8))[0] == (
        f"what {first} multiplies is rounded to 8 bits, and servers would leave it as it is"
        " | export to bitnet, or take act_bits out of ternary-ste"
    )
    assert said(mixed()) == [
        f"{first} and model.layers.0.mlp.gate_proj.weight share their scales in different ways, and a checkpoint has one"
        " | give all the same granularity in ternary-ste, or export to mixed"
    ]


def test_another_target_says_which_one_fits() -> None:
    assert said(frozen(), "int4")[0].endswith(
        "as int4 it would be rounded twice"
        " | export to int2, or add the pass dequantize before the export, which then rounds to int4"
    )
