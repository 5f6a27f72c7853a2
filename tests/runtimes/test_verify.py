"""The verifier passes what is right, and each thing that can be wrong with an export fails under its own name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from graph import Graph, QcError, capture
from graph.hashes import recorded, sha256
from runtimes.export import ABOUT
from runtimes.export.safetensors import Dtype, export
from runtimes.verify import weights_worker
from runtimes.verify.findings import hashes
from runtimes.verify.weights import Rounded, probe_batches
from runtimes.verify.weights import verify_weights as verify
from tests.architectures import config
from tests.runtimes.readers import read_here
from tests.runtimes.test_export_safetensors import tokenizer_folder


@cache
def _captured(kind: Any) -> Graph:
    from transformers import AutoModel, AutoModelForCausalLM

    torch.manual_seed(0)
    name, reader = ("qwen3", AutoModelForCausalLM) if kind == "causal-lm" else ("bert", AutoModel)
    made = reader.from_config(config(name)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return capture(made, kind=kind)


def graph(kind: str = "causal-lm") -> Graph:
    return _captured(kind).copy()


def exported(folder: Path, dtype: Dtype = "fp16", kind: str = "causal-lm") -> Path:
    export(graph(kind), folder / "out", dtype=dtype, source=tokenizer_folder(folder / "source"))
    return folder / "out"


@pytest.fixture
def same_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the reader here: it takes seconds to import transformers anew. One test uses a process of its own."""
    read_here(monkeypatch, weights_worker, OSError, ValueError, RuntimeError)


def failing(folder: Path, tokenizer: Any = None) -> list[tuple[str, str]]:
    return [(f.what, f.found) for f in verify(folder, graph(), tokenizer=tokenizer).findings if not f.passed]


# -- what is right --------------------------------------------------------------------------------------------------


def test_a_process_of_its_own_finds_an_export_right(tmp_path: Path) -> None:
    found = verify(exported(tmp_path), graph())
    assert found.passed, found.table()
    assert found.psnr_db >= 100
    assert found.rounded_db >= 60
    assert found.top1 >= 0.95
    assert found.max_difference < 0.01
    assert [f.what for f in found.findings] == [
        "files", "tensors", "transformers loads it", "written right", "rounded to fp16", "tokenizer", "generation settings",
    ]  # fmt: skip
    assert found.table().splitlines()[2] == "ok    transformers loads it  Qwen3ForCausalLM"
    assert found.figures()["export/psnr_db"] == found.psnr_db


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize(("dtype", "kind"), [("bf16", "causal-lm"), ("fp32", "causal-lm"), ("fp16", "encoder")])
def test_rounding_is_told_from_writing(dtype: Dtype, kind: str, tmp_path: Path) -> None:
    found = verify(exported(tmp_path, dtype, kind), graph(kind))
    assert found.passed, found.table()
    assert found.psnr_db >= 100
    assert found.rounded_db < 100 or dtype == "fp32"


@pytest.mark.usefixtures("same_process")
def test_a_quantized_graph_is_compared_with_what_it_computes(tmp_path: Path) -> None:
    from passes.quantize_base import QuantizeBase

    packed = graph()
    QuantizeBase(scheme="nf4", block=32).run(packed)
    packed.verify()
    export(packed, tmp_path / "out")
    right = verify(tmp_path / "out", packed)
    assert right.passed, right.table()
    assert right.psnr_db >= 100
    wrong = verify(tmp_path / "out", graph())  # the graph before quantization is another model
    assert [f.what for f in wrong.findings if not f.passed] == ["written right", "rounded to fp16"]


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_graph_in_half_precision_is_verified_too(dtype: torch.dtype, tmp_path: Path) -> None:
    half = graph().to(dtype)
    export(half, tmp_path / "out", dtype="bf16" if dtype is torch.bfloat16 else "fp16")
    found = verify(tmp_path / "out", half)
    assert found.passed, found.table()
    assert found.psnr_db >= 100


def test_a_graph_with_rounded_weights_is_that_graph_and_leaves_its_own_alone() -> None:
    ((ids, mask), *_) = probe_batches(graph())
    by_hand = graph()
    for name, info in by_hand.tensors().items():
        if info.saved:
            by_hand.set_tensor(name, by_hand.tensor(name).detach().bfloat16().float())
    plain = graph()
    before = plain.tensor("model.norm.weight").detach().clone()
    with torch.no_grad():
        assert torch.equal(
            Rounded(plain, torch.bfloat16).run_on(ids, mask), by_hand(input_ids=ids, attention_mask=mask)
        )
    assert torch.equal(plain.tensor("model.norm.weight"), before)


# -- what is wrong --------------------------------------------------------------------------------------------------


def sealed(folder: Path) -> None:
    """Make the hashes right again: whoever wrote this export meant it so."""
    about = json.loads((folder / ABOUT).read_text())
    about["files"] = {
        str(p.relative_to(folder)): recorded(p) for p in folder.rglob("*") if p.is_file() and p.name != ABOUT
    }
    (folder / ABOUT).write_text(json.dumps(about))


def rewritten(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        values = load_file(folder / "model.safetensors")
        change(values)
        save_file(
            {name: value.contiguous() for name, value in values.items()}, folder / "model.safetensors", {"format": "pt"}
        )

    return edit


def swap_layers(values: dict[str, Tensor]) -> None:
    a, b = (f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1))
    values[a], values[b] = values[b].clone(), values[a].clone()


def transpose(values: dict[str, Tensor]) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    values[name] = values[name].t().reshape(values[name].shape)


def scale(values: dict[str, Tensor]) -> None:
    values["model.norm.weight"] *= 1.01


def drop(values: dict[str, Tensor]) -> None:
    del values["model.norm.weight"]


def widen(values: dict[str, Tensor]) -> None:
    values["model.norm.weight"] = values["model.norm.weight"].float()


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize("change", [swap_layers, transpose, scale])
def test_wrong_numbers_are_found_though_the_hashes_are_right(change: Any, tmp_path: Path) -> None:
    out = exported(tmp_path)
    rewritten(change)(out)
    sealed(out)
    assert failing(out)[0][0] == "written right"


@pytest.mark.usefixtures("same_process")
def test_a_tensor_that_is_missing_is_what_transformers_reports(tmp_path: Path) -> None:
    out = exported(tmp_path)
    rewritten(drop)(out)
    sealed(out)
    assert failing(out) == [("transformers loads it", 'transformers reports {"missing_keys": ["model.norm.weight"]}')]


def test_a_tensor_of_another_dtype_is_named(tmp_path: Path) -> None:
    out = exported(tmp_path)
    rewritten(widen)(out)
    sealed(out)
    assert failing(out) == [("tensors", "model.norm.weight is not fp16")]


def test_a_flipped_bit_and_a_missing_file_are_named(tmp_path: Path) -> None:
    out = exported(tmp_path)
    path = out / "model.safetensors"
    right = path.read_bytes()
    path.write_bytes(right[:-100] + bytes([right[-100] ^ 1]) + right[-99:])
    flipped = verify(out, graph())
    assert not flipped.passed
    assert flipped.table() == (
        "FAIL  files    model.safetensors is not what was written: its hash is wrong\nok    tensors  24 in fp16"
    )
    path.write_bytes(right)
    (out / "tokenizer.json").unlink()
    assert failing(out) == [("files", "tokenizer.json is missing")]


def test_an_export_of_before_is_held_to_its_sha256_and_one_without_a_hash_is_not_trusted(tmp_path: Path) -> None:
    out = exported(tmp_path)
    about = json.loads((out / ABOUT).read_text())
    about["files"] = {name: {"sha256": sha256(out / name), "bytes": e["bytes"]} for name, e in about["files"].items()}
    (out / ABOUT).write_text(json.dumps(about))
    assert hashes(out, about).passed
    about["files"]["config.json"]["sha256"] = "0" * 64
    assert hashes(out, about).found == "config.json is not what was written: its hash is wrong"
    del about["files"]["config.json"]["sha256"]
    assert hashes(out, about).found == "config.json is not what was written: its hash is wrong"


@pytest.mark.parametrize(
    "files",
    [
        {},
        None,
        {"config.json": "0" * 64},
        {"config.json": None},
        {"config.json": {"bytes": 3}},
        {"config.json": {"blake3": None}},
        {"../config.json": {"blake3": "0" * 64}},
        {"/config.json": {"blake3": "0" * 64}},
    ],
)
def test_a_list_of_files_that_cannot_be_is_damaged(files: Any, tmp_path: Path) -> None:
    out = exported(tmp_path)
    about = json.loads((out / ABOUT).read_text())
    (out / ABOUT).write_text(json.dumps({**about, "files": files}))
    with pytest.raises(QcError) as caught:
        verify(out, graph())
    assert str(caught.value) == f"{out / ABOUT} is damaged\n  fix    export again"


@pytest.mark.parametrize("name", ["model-00002.safetensors", "pytorch_model.bin", "deep/adapter.pt"])
def test_weights_that_were_not_written_are_named(name: str, tmp_path: Path) -> None:
    out = exported(tmp_path)
    (out / "README.md").write_text("what a hub wants")
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_bytes(b"other weights")
    assert failing(out)[0] == ("files", f"{name} is none of those that were written")


@pytest.mark.usefixtures("same_process")
def test_a_wrong_tokenizer_and_missing_settings_are_found(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    out = exported(tmp_path)
    original = AutoTokenizer.from_pretrained(tmp_path / "source")
    assert failing(out, original) == []
    text = (out / "tokenizer.json").read_text()
    (out / "tokenizer.json").write_text(text.replace('"?": 2', '"?": 3').replace('"b": 1', '"c": 1'))
    (out / "generation_config.json").unlink()
    sealed(out)
    assert failing(out, original) == [
        ("tokenizer", "a round trip gives other tokens"),
        ("generation settings", "generation_config.json is missing"),
    ]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).unlink()
    sealed(out)
    assert failing(out, original)[0] == ("tokenizer", "missing")


def test_a_reader_that_does_not_finish_is_a_finding(tmp_path: Path) -> None:
    found = verify(exported(tmp_path), graph(), timeout=0.01)
    assert [(f.what, f.found) for f in found.findings if not f.passed] == [
        ("transformers loads it", "the reader did not finish in 0.01 s")
    ]


def test_a_folder_that_is_no_export_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(QcError) as caught:
        verify(tmp_path, graph())
    assert (
        str(caught.value)
        == f"{tmp_path} is no export of qc: it has no {ABOUT}\n  fix    give the folder that qc export wrote"
    )
    out = exported(tmp_path)
    (out / ABOUT).write_text("{")
    with pytest.raises(QcError) as caught:
        verify(out, graph())
    assert str(caught.value) == f"{out / ABOUT} is damaged\n  fix    export again"
    shutil.rmtree(out)
