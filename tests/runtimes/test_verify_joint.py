"""Exports of two models that were joined: what is written, what transformers computes with it, and what is refused."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from graph import Graph, QcError
from graph.encoder import as_encoder
from passes.attach_memory import AttachMemory
from passes.degrade import Degrade
from passes.insert_gca import InsertGca
from passes.insert_kv_projection import InsertKvProjection
from passes.quantize_base import QuantizeBase
from passes.runner import apply, link
from runtimes.export import ABOUT, obstacles
from runtimes.export._folder import sign
from runtimes.export.safetensors import export
from runtimes.verify import joint_worker, verify
from tests.graph.tiny import qwen
from tests.passes.memories import joint
from tests.runtimes.readers import read_here


@cache
def _made(projected: bool, point: Any = "block_out") -> Graph:
    encoder, decoder = as_encoder(qwen()), qwen()
    for graph in (encoder, decoder):
        apply(QuantizeBase(scheme="nf4", block=32), graph, check=False)
    apply(InsertGca(start=0, every_n=1, separate_values=projected, point=point), decoder, check=False)
    if projected:
        apply(InsertKvProjection(), encoder, check=False)
    return link(AttachMemory(max_tokens=9), {"encoder": encoder, "decoder": decoder}, check=False)[0]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In fp16."""
    out = tmp_path_factory.mktemp("export") / "out"
    export(_made(False), out)
    return out


def test_noise_of_a_training_is_in_nobodys_way(tmp_path: Path) -> None:
    graph = joint_with_noise()
    assert graph.sites("qc.degrade") and not obstacles("safetensors", graph, "fp16", {})
    export(graph, tmp_path / "out")
    layers = json.loads((tmp_path / "out" / "memory.json").read_text())["layers"]
    assert list(layers) == ["model.layers.0", "model.layers.1"]


def joint_with_noise() -> Graph:
    encoder, decoder = as_encoder(qwen()), qwen()
    apply(InsertGca(start=0, every_n=1), decoder, check=False)
    apply(Degrade(), decoder, check=False)
    return link(AttachMemory(max_tokens=9), {"encoder": encoder, "decoder": decoder}, check=False)[0]


def test_two_models_are_written_and_what_is_between_them(exported: Path) -> None:
    about = json.loads((exported / "memory.json").read_text())
    form = {"heads": 2, "kv_heads": 1, "eps": 1e-6, "gate": "sigmoid"}
    layers = {f"model.layers.{n}": form for n in range(2)}
    assert about == {"encoder": {"attention": "causal"}, "max_tokens": 9, "layers": layers}
    written = load_file(exported / "memory.safetensors")
    assert len(written) == 2 * 6
    assert written["model.layers.1.gca.gate"].dtype == written["model.layers.0.gca.norm.weight"].dtype == torch.float32
    assert written["model.layers.0.gca.q_proj.weight"].dtype == torch.float16
    assert "model.embed_tokens.weight" in load_file(exported / "encoder" / "model.safetensors")
    signed = json.loads((exported / ABOUT).read_text())
    assert {"encoder/config.json", "decoder/generation_config.json", "memory.safetensors"} <= signed["files"].keys()


def test_an_export_computes_what_the_graph_computes(exported: Path) -> None:
    found = verify(exported, _made(False))
    assert found.passed, found.table()
    figures = found.figures()
    assert figures["export/psnr_db"] > 100
    assert 45 < figures["rounded_db"] < figures["export/psnr_db"]


@pytest.fixture
def same_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the reader here: it takes seconds to import transformers anew. One test has a process of its own."""
    read_here(monkeypatch, joint_worker, OSError, ValueError, RuntimeError, KeyError)


@pytest.mark.usefixtures("same_process")
def test_projections_behind_the_encoder_go_with_it(tmp_path: Path) -> None:
    export(_made(True), tmp_path / "out", dtype="fp32")
    assert "memory_key.weight" in load_file(tmp_path / "out" / "memory.safetensors")
    found = verify(tmp_path / "out", _made(True))
    assert found.passed, found.table()


@pytest.mark.usefixtures("same_process")
def test_a_gate_that_was_not_the_graphs_is_found(exported: Path, tmp_path: Path) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(exported, other)
    path = other / "memory.safetensors"
    values = load_file(path)
    values["model.layers.1.gca.gate"] += 0.5
    save_file(values, path)
    assert [f.what for f in verify(other, _made(False)).findings if not f.passed] == ["files"]
    head = {k: v for k, v in json.loads((other / ABOUT).read_text()).items() if k != "files"}
    (other / ABOUT).unlink()
    sign(other, head)
    assert "written right" in [f.what for f in verify(other, _made(False)).findings if not f.passed]


def test_what_has_no_loader_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QcError) as caught:
        export(_made(False, "after_attn"), tmp_path / "out")
    assert str(caught.value) == "\n\n".join(
        f"model.layers.{n} has cross-attention inside, and a loader adds it behind the layer\n"
        "  fix    train with point: block_out in insert-gca"
        for n in range(2)
    )
    with pytest.raises(QcError) as caught:
        export(joint(), tmp_path / "out")
    assert str(caught.value).startswith("LoRA is not merged at 8 sites\n")
    assert not (tmp_path / "out").exists()
