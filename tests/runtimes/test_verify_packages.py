"""The verifier passes exports for the Neural Engine that are right, and finds each of many faults in their packages."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from graph import Graph
from graph.tokenizer import load_tokenizer
from runtimes.mil import Package
from runtimes.mil.program import Stored
from runtimes.mil.proto import definitions
from runtimes.verify import packages_worker as worker
from runtimes.verify import verify
from runtimes.verify.probes import decoder_rows
from tests.runtimes.coreml.exports import decoder_graph, encoder_graph, write
from tests.runtimes.readers import read_here, resigned

MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"


@pytest.fixture(scope="module")
def graph() -> Graph:
    return decoder_graph(num_hidden_layers=1)


@pytest.fixture(scope="module")
def sound(graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(graph, tmp_path_factory.mktemp("sound"))


@pytest.fixture
def export(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "out"))


@pytest.fixture
def same_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the reader here; one test uses a process of its own."""
    read_here(monkeypatch, worker)


def edit(export: Path, part: str, change: Callable[[Any], None]) -> None:
    """Change every function of a part."""
    path = export / f"{part}.mlpackage" / MODEL
    spec = definitions().Model()
    spec.ParseFromString(path.read_bytes())
    for function in spec.mlProgram.functions.values():
        change(function.block_specializations[function.opset].operations)
    path.write_bytes(spec.SerializeToString())
    resigned(export)


def op(operations: Any, kind: str, of: str = "", number: int = 0) -> Any:
    """One of the operations of a kind whose names hold a text."""
    return [o for o in operations if o.type == kind and of in o.outputs[0].name][number]


def named(operation: Any, argument: str, index: int = 0) -> Any:
    return operation.inputs[argument].arguments[index]


def constant(operations: Any, name: str) -> Any:
    made = next(o for o in operations if o.type == "const" and o.outputs[0].name == name)
    return made.attributes["val"].immediateValue.tensor


def failing(export: Path, graph: Graph) -> list[str]:
    return [f.what for f in verify(export, graph).findings if not f.passed]


# -- what is right --------------------------------------------------------------------------------------------------


def test_a_process_of_its_own_finds_an_export_right(sound: Path, graph: Graph) -> None:
    found = verify(sound, graph, tokenizer=load_tokenizer(sound, "it"))
    assert found.passed, found.table()
    figures = found.figures()
    assert figures["fp32/psnr_db"] >= 60 and figures["fp16/psnr_db"] >= 40 and figures["ane/psnr_db"] >= 40
    assert figures["export/psnr_db"] == figures["fp16/psnr_db"]
    lines = found.table().splitlines()
    assert lines[1] == "ok    the interpreter reads it  3 packages, 5 functions"
    assert [line[6:25].strip() for line in lines[2:]] == [
        "in fp32 arithmetic", "in fp16 arithmetic", "in ane arithmetic", "greedy tokens", "tokenizer",
    ]  # fmt: skip


@pytest.mark.usefixtures("same_process")
def test_an_encoder_is_verified_at_every_length(tmp_path: Path) -> None:
    made = encoder_graph()
    found = verify(write(made, tmp_path), made)
    assert found.passed, found.table()
    assert "greedy" not in found.table()


def test_the_probe_rows_use_prefill_twice_decode_and_the_last_position(sound: Path) -> None:
    from runtimes.coreml.meta import read_meta

    meta = read_meta(sound)
    rows = decoder_rows(meta)
    assert all(len(row.ids) == sum(row.pieces) <= meta.context for row in rows)
    assert rows[0].pieces[0] > meta.prefill and rows[0].pieces[-1] == 1
    assert rows[2].pieces[3] > 1  # a second turn, read in a block
    assert len(rows[-1].ids) == meta.context


# -- what is wrong --------------------------------------------------------------------------------------------------


def test_a_changed_file_is_found_by_its_hash(export: Path, graph: Graph) -> None:
    path = export / "chunk_1.mlpackage" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    found = verify(export, graph)
    assert [f.found for f in found.findings] == [
        "chunk_1.mlpackage/Data/com.apple.CoreML/weights/weight.bin is not what was written: its hash is wrong"
    ]


@pytest.mark.usefixtures("same_process")
def test_a_package_that_cannot_be_read_is_told(export: Path, graph: Graph) -> None:
    path = export / "chunk_1.mlpackage" / WEIGHTS
    path.write_bytes(path.read_bytes()[:2000])
    resigned(export)
    found = verify(export, graph)
    assert [f.what for f in found.findings if not f.passed] == ["the interpreter reads it"]
    assert "ends behind the 2000 bytes of the file" in found.table()


def _swap(operation: Any, first: str = "x", second: str = "y") -> None:
    one, other = named(operation, first).name, named(operation, second).name
    named(operation, first).name, named(operation, second).name = other, one


def _other_argument(kind: str, of: str, argument: str, give: str, number: int = 0) -> Callable[[Any], None]:
    """Read another value in the place of an argument."""

    def change(operations: Any) -> None:
        named(op(operations, kind, of, number), argument).name = give

    return change


def _another_kind(kind: str, of: str, becomes: str) -> Callable[[Any], None]:
    def change(operations: Any) -> None:
        op(operations, kind, of).type = becomes

    return change


def _halves_not_swapped(operations: Any) -> None:
    halves = op(operations, "concat", "rope").inputs["values"].arguments
    halves[0].name, halves[1].name = halves[1].name, halves[0].name


def _mirror_lost(operations: Any) -> None:
    mirrored = op(operations, "concat", "input_layernorm").inputs["values"].arguments
    mirrored[1].name = mirrored[0].name


def _no_carry(operations: Any) -> None:
    """The residual stream is lost behind attention."""
    add = op(operations, "add", "layers_0_add_add")
    named(add, "x").name = named(add, "y").name


def _wrong_row(operations: Any) -> None:
    """Values are written where keys belong."""
    first, second = (op(operations, "slice_update", "", i) for i in (0, 1))
    for border in ("begin", "end"):
        named(second, border).name = named(first, border).name


def _no_mask(operations: Any) -> None:
    add = op(operations, "add", "attention_add")
    named(add, "y").name = named(add, "x").name


FAULTS: dict[str, Callable[[Any], None]] = {
    "queries are not turned": _other_argument("mul", "rope", "y", "sin", 1),
    "keys are turned by the other half": _halves_not_swapped,
    "the norm has lost its mirror": _mirror_lost,
    "the residual is lost": _no_carry,
    "values are written over keys": _wrong_row,
    "nothing is masked": _no_mask,
    "gate and up are one": lambda ops: _swap_weights(ops, "gate_proj", "up_proj"),
    "keys and values are one": lambda ops: _swap_weights(ops, "k_proj", "v_proj"),
    "tanh is another function": _another_kind("tanh", "act_fn", "sigmoid"),
    "the gate is added": _another_kind("mul", "mlp_mul", "add"),
    "softmax runs over the heads": lambda ops: _softmax_axis(ops),
    "a block is written one further": lambda ops: _position_off(ops),
}  # fmt: skip


def _swap_weights(operations: Any, first: str, second: str) -> None:
    one, other = (op(operations, "conv", name) for name in (first, second))
    weights = named(one, "weight").name, named(other, "weight").name
    named(one, "weight").name, named(other, "weight").name = weights[1], weights[0]
    made = list(operations)
    constants = [i for i, o in enumerate(made) if o.type == "const" and o.outputs[0].name in weights]
    moved = made[constants[1]]  # a constant stands before its readers
    del operations[constants[1]]
    operations.insert(constants[0], moved)


def _softmax_axis(operations: Any) -> None:
    constant(operations, named(op(operations, "softmax"), "axis").name).ints.values[0] = 1


def _position_off(operations: Any) -> None:
    """Keys and values of a block lie one row too far, so that the mask shows the wrong ones."""
    for update in (op(operations, "slice_update", "", i) for i in (0, 1)):
        for border in ("begin", "end"):
            joined = next(o for o in operations if o.outputs and o.outputs[0].name == named(update, border).name)
            bound = joined.inputs["values"].arguments[1]
            bound.name = "shifted" if border == "begin" else "shifted_end"
    source = op(operations, "add", "kv_cache_add")
    for name, of in (("shifted_end", source.outputs[0].name), ("shifted", "position")):
        made = type(source)()
        made.CopyFrom(source)
        made.outputs[0].name = name
        named(made, "x").name = of
        if name == "shifted":
            made.inputs["y"].arguments[0].ClearField("name")
            made.inputs["y"].arguments[0].value.CopyFrom(_one(source))
        else:
            made.inputs["y"].arguments[0].ClearField("name")
            made.inputs["y"].arguments[0].value.CopyFrom(_one(source))
        place = next(i for i, o in enumerate(operations) if o.outputs and o.outputs[0].name == source.outputs[0].name)
        operations.insert(place + 1, made)


def _one(source: Any) -> Any:
    value = definitions().MIL__pb2.Value()
    value.type.CopyFrom(source.outputs[0].type)
    value.immediateValue.tensor.ints.values.append(1)
    return value


@pytest.mark.slow
@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_chunk_is_found(fault: str, export: Path, graph: Graph) -> None:
    edit(export, "chunk_1", FAULTS[fault])
    assert failing(export, graph)


@pytest.mark.usefixtures("same_process")
def test_a_fault_in_weights_rotations_and_head_is_found(export: Path, graph: Graph) -> None:
    path = export / "rope.safetensors"
    tables = load_file(path)
    save_file({name: -t if name == "sin" else t for name, t in tables.items()}, path)
    resigned(export)
    assert "in fp32 arithmetic" in failing(export, graph)
    save_file(tables, path)
    path = export / "chunk_1.mlpackage" / WEIGHTS
    whole = bytearray(path.read_bytes())
    stored = [
        op.attributes.get("val") for op in Package(path.parents[3]).function("infer").operations if "q_proj" in op.name
    ]
    (offset,) = [value.offset for value in stored if isinstance(value, Stored)]
    row, start = 2 * 64, offset + 64  # two rows of the weight change places
    whole[start : start + row], whole[start + row : start + 2 * row] = (
        whole[start + row : start + 2 * row], whole[start : start + row],
    )  # fmt: skip
    path.write_bytes(bytes(whole))
    resigned(export)
    assert "in fp32 arithmetic" in failing(export, graph)


@pytest.mark.usefixtures("same_process")
def test_what_overflows_is_named(tmp_path: Path) -> None:
    large = decoder_graph(num_hidden_layers=1)
    for name in ("up_proj", "down_proj"):
        name = f"model.layers.0.mlp.{name}.weight"
        large.set_tensor(name, large.tensor(name) * 3000)
    found = verify(write(large, tmp_path), large)
    told = next(f for f in found.findings if f.what == "in ane arithmetic")
    assert not told.passed
    assert "values are not finite from chunk_1.mlpackage: " in told.found and "down_proj" in told.found


@pytest.mark.usefixtures("same_process")
def test_another_tokenizer_is_found(sound: Path, graph: Graph) -> None:
    class Other:
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [len(text) % 7]}

    found = verify(sound, graph, tokenizer=Other())
    assert [f.what for f in found.findings if not f.passed] == ["tokenizer"]


@pytest.mark.usefixtures("same_process")
def test_another_graph_is_found(sound: Path) -> None:
    torch.manual_seed(1)
    other = decoder_graph(num_hidden_layers=1)
    name = "model.layers.0.self_attn.o_proj.weight"
    other.set_tensor(name, other.tensor(name) + 0.01)
    assert "in fp32 arithmetic" in failing(sound, other)
