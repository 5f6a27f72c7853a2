"""Weights of vectors in packages: packed along the outputs, as small as the formula says, and no rule is broken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graph import Graph, Selector, capture, capture_module
from graph.checkpoint import locate
from graph.formats import LutOptions, dense_value, packed_sites, weight_name
from passes.quantize_base import QuantizeBase
from passes.runner import apply
from passes.snap import Snap
from runtimes.ane.mil import FunctionPlan, Port, write_package
from runtimes.ane.weights import weight_of
from runtimes.export.ane import export
from runtimes.lint.report import lint
from runtimes.mil import Interpreter, Package
from runtimes.verify import packages_worker as worker
from runtimes.verify import verify
from tests.runtimes.ane.models import quantized
from tests.runtimes.coreml.exports import decoder_graph, write
from tests.runtimes.readers import read_here

EVERY = Selector(name="*")
FORMULA = {(4, 2): 786_688, (4, 4): 393_536, (6, 4): 590_528}
"""(bits, V) -> the bytes that indices and table of 1024 x 3072 weights take in a file, its headers included."""


def pairs(graph: Graph, **options: Any) -> Graph:
    return quantized(graph, "lut", **({"bits": 4, "vector": 2, "scale": "channel"} | options))


@pytest.fixture(scope="module")
def graph() -> Graph:
    return pairs(decoder_graph(num_hidden_layers=1, rms_norm_eps=1e-3))


@pytest.fixture(scope="module")
def folder(graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(graph, tmp_path_factory.mktemp("vectors"))


def test_an_export_of_vectors_is_right(graph: Graph, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_here(monkeypatch, worker)
    found = verify(folder, graph)
    assert found.passed, found.table()


def test_a_package_holds_a_table_of_each_weight_and_its_vectors_lie_along_the_outputs(folder: Path) -> None:
    function = Package(folder / "chunk_1.mlpackage").function("infer")
    lookups = [op for op in function.operations if op.type == "constexpr_lut_to_dense"]
    assert len(lookups) == 7
    for op in lookups:
        types = {name: bindings[0].type for name, bindings in op.arguments.items() if hasattr(bindings[0], "type")}
        rows, columns, *_ = op.outputs[0].type.shape
        assert rows is not None and str(types["indices"]).startswith("uint4")
        assert types["indices"].shape == (rows // 2, columns, 1, 1)
        assert types["lut"].shape == (1, 1, 1, 1, 16, 2)
    multiplied = [op for op in function.operations if op.type == "mul" and op.outputs[0].name.endswith("_mul")]
    assert len(multiplied) >= 7  # the scale of each row, behind the product


def test_the_interpreter_unpacks_what_the_graph_unpacks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    graph = capture_module(nn.Sequential(nn.Linear(48, 64, bias=False)), torch.randn(3, 48))
    options = LutOptions(bits=4, vector=4, scale="none", train="none")
    apply(QuantizeBase(scheme="lut", lut=options, select=EVERY), graph, check=False)
    apply(Snap(select=EVERY), graph, check=False)
    site = graph.sites("aten.linear")[0]
    weight = weight_of(graph, site.input(1), site.name)
    indices, table = weight.table()

    def body(emit: Any) -> None:
        dense = emit.vector_weight(indices[:, :, None, None], table, weight.bits)
        emit.outputs([("y", emit.op("conv", x=emit.input("x"), weight=dense, pad_type="valid"))])

    write_package({"main": FunctionPlan({"x": Port((1, 48, 1, 48))}, body)}, tmp_path / "w.mlpackage", "iOS18")
    eye = torch.eye(48).reshape(1, 48, 1, 48)
    found = Interpreter(tmp_path / "w.mlpackage").run({"x": eye})["y"]
    assert torch.equal(found[0, :, 0].float(), dense_value(graph, packed_sites(graph)[0], torch.float32))


@pytest.mark.parametrize(("bits", "width"), FORMULA)
def test_the_file_is_as_large_as_the_formula_says(bits: Any, width: Any, tmp_path: Path) -> None:
    indices = torch.randint(0, 1 << bits, (1024 // width, 3072), dtype=torch.uint8).numpy()
    table = torch.randn(1 << bits, width).half().numpy()

    def body(emit: Any) -> None:
        dense = emit.vector_weight(indices[:, :, None, None], table, bits)
        emit.outputs([("y", emit.op("conv", x=emit.input("x"), weight=dense, pad_type="valid"))])

    write_package({"main": FunctionPlan({"x": Port((1, 3072, 1, 1))}, body)}, tmp_path / "w.mlpackage", "iOS18")
    written = sum(file.stat().st_size for file in (tmp_path / "w.mlpackage").rglob("weight.bin"))
    assert written == FORMULA[bits, width]
    assert written == pytest.approx(1024 * 3072 * bits / width / 8 + 2 * (width << bits), rel=0.01)


def test_fp16_weights_for_transformers_are_what_vectors_stand_for(graph: Graph, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from runtimes.export.safetensors import export as to_safetensors

    to_safetensors(graph, tmp_path / "out", dtype="fp16")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for site in packed_sites(graph):
        assert found[weight_name(site)].equal(dense_value(graph, site, torch.float32).half())
    assert verify(tmp_path / "out", graph).passed


@pytest.mark.slow
def test_the_seedling_on_pairs_is_exported_verified_and_no_rule_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_here(monkeypatch, worker)
    graph = pairs(capture("seedling").materialize())
    apply(Snap(select=Selector(name="*.weight.*")), graph, check=False)
    report = export(graph, tmp_path / "out", tokenizer=locate("seedling"), context=64, prefill=8, calibration=128)
    found = verify(tmp_path / "out", graph)
    assert found.passed, found.table()
    linted = lint(tmp_path / "out")
    assert linted.passed and not [one for one in linted.violations if one.rule in ("W2", "W3", "N11")]
    written = sum(file.stat().st_size for file in (tmp_path / "out").rglob("weight.bin"))
    assert written == pytest.approx(float(report.figures["weight_bytes"]), rel=0.01)


@pytest.mark.slow
def test_pairs_lose_less_of_the_seedling_than_two_bits_of_single_levels() -> None:
    found = {}
    of = {
        "single": LutOptions(bits=2, scale="channel"),
        "pairs": LutOptions(bits=4, vector=2, scale="channel"),
    }
    for name, lut in of.items():
        graph = capture("seedling").materialize()
        found[name] = apply(QuantizeBase(scheme="lut", lut=lut), graph, check=False).figures
    bits = [float(one["bits_per_weight_once_baked"]) for one in found.values()]
    assert bits[1] == pytest.approx(bits[0], abs=0.005)
    assert float(found["pairs"]["mean_snr_db"]) > float(found["single"]["mean_snr_db"]) + 0.6
    assert float(found["pairs"]["worst_snr_db"]) > float(found["single"]["worst_snr_db"]) + 0.5
