"""The verifier passes ONNX exports that are right, and finds each of many faults in their files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from graph import Graph
from graph.hashes import recorded
from runtimes.export import ABOUT
from runtimes.onnx.file import DATA, MODEL
from runtimes.verify import onnx_worker as worker
from runtimes.verify import verify
from tests.runtimes.ane.models import quantized, random
from tests.runtimes.onnx.running import written
from tests.runtimes.readers import read_here

SQUARE = "model.layers.0.self_attn.k_proj.weight"
"""A weight of 32 rows and 32 columns: turned, it still fits."""


@pytest.fixture(scope="module")
def graph() -> Graph:
    return quantized(random("qwen3"), "int4", block=16)


@pytest.fixture(scope="module")
def sound(graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(graph, tmp_path_factory.mktemp("sound") / "out", inline=64, kv=True)


@pytest.fixture
def export(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "out"))


@pytest.fixture
def same_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the reader here; one test uses a process of its own."""
    read_here(monkeypatch, worker)


def test_a_sound_export_passes_in_a_process_of_its_own(graph: Graph, sound: Path) -> None:
    report = verify(sound, graph)
    assert report.passed, report.table()
    assert [finding.what for finding in report.findings] == [
        "files", "weights", "size", "configuration", "inputs and outputs", "values", "ONNX Runtime reads it",
        "on random tokens", "as ONNX Runtime sets itself", "tokenizer",
    ]  # fmt: skip
    figures = report.figures()
    assert figures["max_difference"] < 1e-5 and figures["top1"] == 1.0 and abs(figures["size_off"]) < 0.02


def rewrite(export: Path, change: Callable[[Any], None]) -> None:
    """Change the model, not what lies beside it."""
    model = onnx.load(str(export / MODEL), load_external_data=False)
    change(model.graph)
    (export / MODEL).write_bytes(model.SerializeToString())


def tensor(graph: Any, name: str) -> Any:
    return next(t for t in graph.initializer if t.name == name)


def place(export: Path, name: str) -> tuple[int, int]:
    """Where a tensor lies in the file beside the model, and its bytes."""
    model = onnx.load(str(export / MODEL), load_external_data=False)
    said = {entry.key: entry.value for entry in tensor(model.graph, name).external_data}
    return int(said["offset"]), int(said["length"])


def change_bytes(export: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change the bytes of a tensor beside the model."""
    start, length = place(export, name)
    data = bytearray((export / DATA).read_bytes())
    new = change(np.frombuffer(bytes(data[start : start + length]), dtype=np.uint8)).tobytes()
    assert len(new) == length and new != bytes(data[start : start + length])
    data[start : start + length] = new
    (export / DATA).write_bytes(data)


def nibbles(data: Any) -> Any:
    return np.stack((data & 15, data >> 4), axis=-1).reshape(-1)


def transposed(export: Path) -> None:
    def turn(data: Any) -> Any:
        codes = nibbles(data).reshape(32, 32).T.reshape(-1)
        return (codes[::2] | codes[1::2] << 4).astype(np.uint8)

    change_bytes(export, f"{SQUARE}.codes", turn)


def nibble_order(export: Path) -> None:
    change_bytes(export, f"{SQUARE}.codes", lambda data: (data >> 4 | data << 4).astype(np.uint8))


def reciprocal(export: Path) -> None:
    change_bytes(export, f"{SQUARE}.scale", lambda data: 1 / data.view(np.float32))


def zero_point(export: Path) -> None:
    def change(graph: Any) -> None:
        scale = tensor(graph, f"{SQUARE}.scale")
        size = int(np.prod(scale.dims))
        zeros = helper.make_tensor("one", onnx.TensorProto.INT4, scale.dims, b"\x11" * (size // 2), raw=True)
        graph.initializer.append(zeros)
        next(node for node in graph.node if f"{SQUARE}.codes" in node.input).input.append("one")

    rewrite(export, change)


def block_axis(export: Path) -> None:
    def change(graph: Any) -> None:
        node = next(node for node in graph.node if f"{SQUARE}.codes" in node.input)
        next(a for a in node.attribute if a.name == "axis").i = 1
        scale = tensor(graph, f"{SQUARE}.scale")
        dims = list(scale.dims)[::-1]
        del scale.dims[:]
        scale.dims.extend(dims)

    rewrite(export, change)


def replace_op(kind: str, other: str) -> Callable[[Path], None]:
    def damage(export: Path) -> None:
        def change(graph: Any) -> None:
            next(node for node in graph.node if node.op_type == kind).op_type = other

        rewrite(export, change)

    return damage


def wrong_scale_of_attention(export: Path) -> None:
    def change(graph: Any) -> None:
        half = next(
            t for t in graph.initializer if not t.dims and t.data_type == 1 and numpy_helper.to_array(t) == 0.25
        )
        half.CopyFrom(numpy_helper.from_array(np.array(0.3, dtype=np.float32), half.name))

    rewrite(export, change)


def missing_data(export: Path) -> None:
    (export / DATA).unlink()


def short_data(export: Path) -> None:
    (export / DATA).write_bytes((export / DATA).read_bytes()[:-32])


def moved(export: Path) -> None:
    def change(graph: Any) -> None:
        a, b = (tensor(graph, f"model.layers.{i}.mlp.up_proj.weight.codes") for i in (0, 1))
        offsets = [next(e for e in t.external_data if e.key == "offset") for t in (a, b)]
        offsets[0].value, offsets[1].value = offsets[1].value, offsets[0].value

    rewrite(export, change)


def unpacked(export: Path) -> None:
    """The values are right, but a weight is held in fp32."""

    def change(graph: Any) -> None:
        node = next(node for node in graph.node if "model.layers.0.mlp.up_proj.weight.codes" in node.input)
        names = list(node.input)
        whole = onnx.load(str(export / MODEL)).graph
        codes = nibbles(np.frombuffer(tensor(whole, names[0]).raw_data, dtype=np.uint8)).astype(np.int8).reshape(32, 64)
        scale = np.frombuffer(tensor(whole, names[1]).raw_data, dtype=np.float32).reshape(2, 64)
        dense = np.where(codes > 7, codes - 16, codes) * scale.repeat(16, axis=0)
        for name in names:
            graph.initializer.remove(tensor(graph, name))
        graph.initializer.append(numpy_helper.from_array(dense.astype(np.float32), node.output[0]))
        graph.node.remove(node)

    rewrite(export, change)
    compact(export)


def compact(export: Path) -> None:
    """Put everything into the model, so that nothing beside it is left over."""
    model = onnx.load(str(export / MODEL))
    (export / MODEL).write_bytes(model.SerializeToString())
    (export / DATA).unlink()


def past_exchanged(export: Path) -> None:
    def change(graph: Any) -> None:
        ends = [node for node in graph.node if node.output[0] in ("present.0.key", "present.0.value")]
        ends[0].input[0], ends[1].input[0] = ends[1].input[0], ends[0].input[0]

    rewrite(export, change)


def past_too_short(export: Path) -> None:
    """New tokens stand where the past begins."""

    def change(graph: Any) -> None:
        node = next(node for node in graph.node if node.op_type == "Range" and "positions" in node.output[0])
        graph.initializer.append(numpy_helper.from_array(np.array(1, dtype=np.int64), "begin"))
        node.input[0] = "begin"

    rewrite(export, change)


def unknown_op(export: Path) -> None:
    replace_op("Softmax", "Softmux")(export)


FAULTS: list[tuple[Callable[[Path], None], str]] = [
    (transposed, "on random tokens"),
    (nibble_order, "on random tokens"),
    (reciprocal, "on random tokens"),
    (zero_point, "on random tokens"),
    (block_axis, "on random tokens"),
    (replace_op("LessOrEqual", "Less"), "on random tokens"),  # the mask hides each token from itself
    (replace_op("Neg", "Identity"), "on random tokens"),  # rotations turn the other way
    (wrong_scale_of_attention, "on random tokens"),
    (past_exchanged, "on random tokens"),
    (past_too_short, "ONNX Runtime reads it"),
    (moved, "on random tokens"),
    (unpacked, "size"),
    (missing_data, "weights"),
    (short_data, "weights"),
    (unknown_op, "ONNX Runtime reads it"),
]


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize(("damage", "what"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_fault_that_the_hashes_know_nothing_of_is_found(
    damage: Callable[[Path], None], what: str, graph: Graph, export: Path
) -> None:
    damage(export)
    sign_again(export)
    failed = [finding.what for finding in verify(export, graph).findings if not finding.passed]
    assert what in failed, failed


def sign_again(export: Path) -> None:
    about = json.loads((export / ABOUT).read_text())
    files = {name: export / name for name in about["files"] if (export / name).is_file()}
    about["files"] = {name: recorded(path) for name, path in files.items()}
    (export / ABOUT).write_text(json.dumps(about))


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (missing_data, "model.onnx.data is missing"),
        (short_data, "model.onnx.data is not what was written: its hash is wrong"),
    ],
)
def test_what_was_changed_behind_the_export_is_named(
    damage: Callable[[Path], None], found: str, graph: Graph, export: Path
) -> None:
    damage(export)
    assert verify(export, graph).findings[0].found == found


def test_settings_for_generation_alone_are_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "phi3"}')
    (tmp_path / "generation_config.json").write_text("{}")
    assert worker._tokens(tmp_path) is None
