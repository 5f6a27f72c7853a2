"""What shapes alone tell of an export, before it is written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from graph import Graph, raise_all
from runtimes.ane.plan import Plan, Settings, plan
from runtimes.ane.profile import Profile, load_profile
from runtimes.lint.planned import obstacles, planned
from tests.runtimes.coreml.exports import decoder_graph

M1, M4 = load_profile("m1-macos15"), load_profile("m4-macos15")


@pytest.fixture(scope="module")
def graph() -> Graph:
    from graph.formats import LutOptions
    from passes.quantize_base import QuantizeBase

    made = decoder_graph()
    QuantizeBase(scheme="lut", lut=LutOptions(bits=2, scale="channel")).run(made)
    made.verify()
    return made


def made(graph: Graph, profile: Profile, **settings: Any) -> Plan:
    given: dict[str, Any] = {"context": 32, "prefill": 8}
    found, errors = plan(graph, Settings(profile=profile, **(given | settings)))
    raise_all(errors)
    assert found is not None
    return found


def test_a_plan_within_the_limits_has_no_obstacle(graph: Graph) -> None:
    assert list(planned(made(graph, M4))) == []


def test_indices_that_a_chip_does_not_stream_are_told_and_no_error(graph: Graph) -> None:
    found = list(planned(made(graph, M1)))
    assert {rule for rule, _, _ in found} == {"W5"}
    assert found[0][2] == "2-bit indices; m1-macos15 streams 4, 6, 8"
    assert obstacles(made(graph, M1)) == []


@pytest.fixture(scope="module")
def vectors() -> Graph:
    from graph.formats import LutOptions
    from passes.quantize_base import QuantizeBase

    made = decoder_graph(num_hidden_layers=1)
    QuantizeBase(scheme="lut", lut=LutOptions(bits=4, vector=2, scale="channel")).run(made)
    made.verify()
    return made


@pytest.mark.parametrize("profile", [M1, M4])
def test_vectors_along_the_outputs_on_a_table_of_each_tensor_are_no_obstacle(vectors: Graph, profile: Profile) -> None:
    assert list(planned(made(vectors, profile))) == []


def test_a_table_of_vectors_that_is_too_large_is_an_error() -> None:
    from graph.formats import VectorLut, store_packed

    graph, name = decoder_graph(num_hidden_layers=1), "model.layers.0.mlp.up_proj.weight"
    form = VectorLut(columns=64, levels=64, vector=8)
    store_packed(graph, name, form, form.pack(graph.tensor(name)))
    graph.verify()
    assert [str(error) for error in obstacles(made(graph, M4))] == [
        f"{name}: a vector table of 512 values (lint rule W2)\n"
        f"  site   {name}\n  fix    use one table a tensor and a scale a row"
    ]


def test_axes_and_weights_beyond_the_limits_are_errors(graph: Graph) -> None:
    tight = replace(M4, max_dim=16, max_channels=90, tensor_bytes=1000)
    found = [str(error) for error in obstacles(made(graph, tight))]
    assert found[0] == (
        "attention: 32 keys, m4-macos15 takes 16 (lint rule S2)\n"
        "  site   attention\n  fix    split the tensor along that axis"
    )
    assert any("96 channels, m4-macos15 takes 90 (lint rule S2)" in text for text in found)
    assert any("bytes, m4-macos15 takes 1000 of a tensor (lint rule W1)" in text for text in found)


def test_in_mode_io_the_block_counts_as_keys(graph: Graph) -> None:
    keys = replace(M4, softmax_keys=36)
    assert [rule for rule, _, _ in planned(made(graph, keys))] == []
    assert [rule for rule, _, _ in planned(made(graph, keys, kv="io"))] == ["S11"]
