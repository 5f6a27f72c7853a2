"""safetensors files and model folders: read to the letter of the format, and what is damaged is named."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import shutil
import struct
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from graph import QcError, behind, capture, weights
from graph.checkpoint import locate, open_checkpoint, read_config, weight_files
from graph.formats.ahead import worked_ahead
from graph.hashes import blake3_of, sha256, tensor_sha256
from graph.weights import AT_ONCE, WAITING, Entry, read_header, read_metadata, write
from tests.graph.tiny import checkpoint, model, qwen

FETCH = "fetch the file again, or point the recipe at an undamaged checkpoint"


def entry(name: str, value: Tensor) -> Entry:
    return Entry(name, tuple(value.shape), value.dtype, lambda: value)


def errors(action: Callable[..., Any], *args: Any) -> str:
    with pytest.raises(QcError) as caught:
        action(*args)
    return str(caught.value)


def raw(path: Path, header: Any, data: bytes = b"") -> Path:
    """A file with this header, which may be nonsense."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def one(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


# -- files ----------------------------------------------------------------------------------------------------------


def every_dtype() -> dict[str, Tensor]:
    floats = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
    integers = [
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
    ]
    found = {f"{dtype}": torch.randn(3, 5).to(dtype) for dtype in floats}
    found |= {f"{dtype}": torch.arange(7).to(dtype) for dtype in integers}
    return found | {"bool": torch.tensor([True, False]), "scalar": torch.tensor(3.5), "empty": torch.empty(0, 4)}


def test_what_is_written_is_read_back_in_every_dtype(tmp_path: Path) -> None:
    tensors = every_dtype()
    write(tmp_path, [entry(name, value) for name, value in tensors.items()], stem="w")
    read = {name: stored.load() for name, stored in read_header(tmp_path / "w.safetensors").items()}
    assert read.keys() == tensors.keys()
    for name, value in tensors.items():
        assert read[name].dtype == value.dtype
        assert tensor_sha256(read[name]) == tensor_sha256(value), name
    assert read_metadata(tmp_path / "w.safetensors") == {"format": "pt"}


@pytest.mark.peer
def test_safetensors_reads_what_we_write_and_we_read_what_it_writes(tmp_path: Path) -> None:
    tensors = every_dtype()
    write(tmp_path, [entry(name, value) for name, value in tensors.items()], stem="w")
    for name, value in load_file(tmp_path / "w.safetensors").items():
        assert tensor_sha256(value) == tensor_sha256(tensors[name])
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt", "who": "them"})
    for name, stored in read_header(tmp_path / "theirs.safetensors").items():
        assert tensor_sha256(stored.load()) == tensor_sha256(tensors[name])
    with safe_open(tmp_path / "theirs.safetensors", "pt") as file:
        assert read_metadata(tmp_path / "theirs.safetensors") == file.metadata()


def test_the_same_tensors_make_the_same_file_in_any_order(tmp_path: Path) -> None:
    tensors = [entry(name, value) for name, value in every_dtype().items()]
    write(tmp_path, tensors, stem="a")
    write(tmp_path, tensors[::-1], stem="b")
    assert sha256(tmp_path / "a.safetensors") == sha256(tmp_path / "b.safetensors")


def test_shards_are_filled_in_order_and_indexed(tmp_path: Path) -> None:
    tensors = {name: torch.randn(100) for name in "abcde"}
    where = write(tmp_path, [entry(name, value) for name, value in tensors.items()], stem="w", max_shard=900)
    names = [f"w-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert where == {"a": names[0], "b": names[0], "c": names[1], "d": names[1], "e": names[2]}
    index = json.loads((tmp_path / "w.safetensors.index.json").read_bytes())
    assert index == {"metadata": {"total_size": 2000}, "weight_map": where}
    assert torch.equal(read_header(tmp_path / names[2])["e"].load(), tensors["e"])


def test_what_is_written_is_hashed_on_the_way(tmp_path: Path) -> None:
    tensors = {name: torch.randn(100, 30) for name in "abcde"} | {"none": torch.empty(0, 3), "one": torch.tensor(2.0)}
    hashes: dict[str, str] = {}
    where = write(
        tmp_path, [entry(name, value) for name, value in tensors.items()], stem="w", max_shard=25_000, hashes=hashes
    )
    assert hashes == {name: blake3_of(tmp_path / name) for name in set(where.values())}
    assert len(hashes) == 3


def test_no_more_tensors_are_asked_for_than_threads_make_and_a_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "WORTH_A_TURN", 16)
    threads, most = min(torch.get_num_threads(), AT_ONCE), []
    held: set[int] = set()

    def load(name: str) -> Tensor:
        value = torch.full((4,), float(ord(name)))
        held.add(id(value))
        weakref.finalize(value, held.discard, id(value))
        most.append(len(held))
        return value

    entries = [Entry(name, (4,), torch.float32, lambda name=name: load(name)) for name in "abcdefghijkl"]  # type: ignore[misc]
    write(tmp_path, entries, stem="w")
    assert max(most) <= threads + WAITING + 1, "those in work, those that wait, and one that is being written"
    assert {key: value[0].item() for key, value in load_file(tmp_path / "w.safetensors").items()} == {
        name: ord(name) for name in "abcdefghijkl"
    }


def test_small_tensors_share_a_turn_and_large_ones_have_one_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "WORTH_A_TURN", 16 * 4)
    turns: list[list[str]] = []
    ahead = worked_ahead

    def watched(work: Any, groups: Iterable[list[Entry]], threads: int, waiting: int) -> Iterator[Any]:
        taken = list(groups)
        turns.extend([one.name for one in group] for group in taken)
        return ahead(work, taken, threads, waiting)

    monkeypatch.setattr("graph.formats.ahead.worked_ahead", watched)
    sizes = {"a": 3, "b": 3, "c": 20, "d": 16, "e": 2, "f": 2}
    write(tmp_path, [entry(name, torch.ones(size)) for name, size in sizes.items()], stem="w")
    assert turns == [["a", "b", "c"], ["d"], ["e", "f"]]


def test_what_is_made_together_is_asked_for_by_one_thread_in_order(tmp_path: Path) -> None:
    asked: dict[str, list[tuple[str, int]]] = {"a": [], "b": []}

    def load(name: str) -> Tensor:
        asked[name[0]].append((name, threading.get_ident()))
        time.sleep(0.01)
        return torch.ones(4)

    names = ["a.codes", "a.scale", "a.zero", "b.codes", "b.scale"]
    entries = [Entry(name, (4,), torch.float32, partial(load, name), name[0]) for name in reversed(names)]
    write(tmp_path, entries, stem="w")
    assert [[name for name, _ in of] for of in asked.values()] == [names[:3], names[3:]]
    assert all(len({thread for _, thread in of}) == 1 for of in asked.values())


def test_a_tensor_made_of_pieces_is_written_as_one_and_never_asked_for_whole(tmp_path: Path) -> None:
    value, rest = torch.randn(7, 30), torch.randn(5)

    def whole() -> Tensor:
        raise AssertionError("asked for as a whole")

    pieces = tuple(entry(f"b[{start}]", value[start : start + 3]) for start in range(0, 7, 3))
    hashes: dict[str, str] = {}
    large = Entry("b", (7, 30), torch.float32, whole, pieces=pieces)
    write(tmp_path, [entry("a", rest), large, entry("c", rest)], stem="pieces", hashes=hashes)
    write(tmp_path, [entry("a", rest), entry("b", value), entry("c", rest)], stem="whole")
    assert hashes == {"pieces.safetensors": blake3_of(tmp_path / "whole.safetensors")}


def test_rows_of_a_stored_tensor_are_read_alone(tmp_path: Path) -> None:
    value = torch.randn(7, 3, 2)
    write(tmp_path, [entry("a", torch.ones(5)), entry("b", value)], stem="w")
    stored = read_header(tmp_path / "w.safetensors")["b"]
    assert stored.rows(2, 6).load().equal(value[2:6])
    assert stored.rows(6, 7).end == stored.end


def test_what_is_written_goes_to_the_disk_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    begun, sync = threading.Event(), os.fsync

    def counted(descriptor: int) -> None:
        sent.append(os.fstat(descriptor).st_size)
        begun.set()
        sync(descriptor)

    def last() -> Tensor:
        assert begun.wait(10), "the first is not on its way"
        return torch.ones(1000)

    monkeypatch.setattr(behind, "FLUSH", 4000)
    monkeypatch.setattr(weights, "WORTH_A_TURN", 4000)
    monkeypatch.setattr(os, "fsync", counted)
    write(tmp_path, [entry("a", torch.ones(1000)), Entry("b", (1000,), torch.float32, last)], stem="w")
    assert 4000 < sent[0] < 8000 < sent[-1] == (tmp_path / "w.safetensors").stat().st_size


def test_a_disk_that_does_not_take_it_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(behind, "FLUSH", 4000)
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        write(tmp_path, [entry(name, torch.ones(1000)) for name in "abc"], stem="w")


def test_a_tensor_that_cannot_be_made_is_an_error_at_its_turn(tmp_path: Path) -> None:
    def broken() -> Tensor:
        raise QcError("b is broken", fix="mend it")

    entries = [entry("a", torch.ones(4)), Entry("b", (4,), torch.float32, broken), entry("c", torch.ones(4))]
    assert errors(lambda: write(tmp_path, entries, stem="w")).startswith("b is broken")


@pytest.mark.parametrize(
    ("header", "data", "what"),
    [
        (b"[]", b"", "the header of {} is damaged"),
        (b"{ ", b"", "the header of {} is damaged"),
        (b"\xff\xfe", b"", "the header of {} is damaged"),
        (b"[" * 100_000, b"", "the header of {} is damaged"),
        (b'{"a":1,"a":1}', b"", "the header of {} is damaged"),
        (b"{}\n", b"", "the header of {} is damaged"),
        ({"__metadata__": {"step": 1}}, b"", "the header of {} is damaged"),
        ({"a": 1}, b"", "the header of {} is damaged at a"),
        (one(shape=2), bytes(8), "the header of {} is damaged at a"),
        (one(shape=[2.0]), bytes(8), "the header of {} is damaged at a"),
        (one(shape=[-2]), bytes(8), "the header of {} is damaged at a"),
        (one(shape=[True, 2]), bytes(8), "the header of {} is damaged at a"),
        (one(data_offsets=[0]), bytes(8), "the header of {} is damaged at a"),
        (one(data_offsets=[0.0, 8.0]), bytes(8), "the header of {} is damaged at a"),
        (one(more=1), bytes(8), "the header of {} is damaged at a"),
        (one(dtype=7), bytes(8), "the header of {} is damaged at a"),
        (one(dtype="C64"), bytes(8), "{} holds a as C64, which is no dtype that qc reads"),
        (one(shape=[3]), bytes(8), "{} gives a a shape that does not fit its bytes"),
        (one(data_offsets=[8, 0]), bytes(8), "{} gives a a shape that does not fit its bytes"),
        (one(), bytes(7), "{} is cut short: a ends at byte 77 of 76"),
        (one(), bytes(9), "{} has 78 bytes where its header announces 77"),
        (one(data_offsets=[4, 12]), bytes(12), "the header of {} is damaged at a: its bytes do not begin where the last end"),
        (one() | {"b": one()["a"]}, bytes(8), "the header of {} is damaged at b: its bytes do not begin where the last end"),
        (b"", b"", "{} is not a safetensors file"),
        (one(), b"", "{} is cut short: a ends at byte 77 of 69"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(header: Any, data: bytes, what: str, tmp_path: Path) -> None:
    path = raw(tmp_path / "w.safetensors", header, data)
    assert errors(read_header, path) == f"{what.format(path)}\n  fix    {FETCH}"


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert errors(read_header, tmp_path / "w.safetensors") == (
        f"cannot read {tmp_path / 'w.safetensors'}: No such file or directory\n"
        "  fix    check the path and its permissions"
    )


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_is_refused_whatever_its_name(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps({"w": list(range(500))}, protocol=protocol))
    assert errors(read_header, path) == (
        f"{path} is a pickle, which qc never reads\n  fix    convert the checkpoint to safetensors"
    )


def test_a_file_cut_short_after_it_was_opened_is_named(tmp_path: Path) -> None:
    write(tmp_path, [entry("a", torch.ones(100))], stem="w")
    path = tmp_path / "w.safetensors"
    stored = read_header(path)["a"]
    path.write_bytes(path.read_bytes()[:-4])
    assert errors(stored.load) == f"{path} ends in the middle of a\n  fix    {FETCH}"
    path.unlink()
    assert errors(stored.load) == (
        f"cannot read {path}: No such file or directory\n  fix    see that the checkpoint is still there and readable"
    )


# -- model folders --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("models") / "whole")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """What a graph would get from the folder, without capturing it anew."""
    return {name: stored.load() for name, stored in open_checkpoint(str(folder)).bind(qwen()).items()}


def rewrite(folder: Path, **changes: Any) -> None:
    """Save the folder's tensors again, some of them changed or, with None, left out."""
    path = folder / "model.safetensors"
    kept = {name: value for name, value in (load_file(path) | changes).items() if value is not None}
    save_file(kept, path, metadata={"format": "pt"})


def test_a_folder_gives_every_tensor_of_the_graph(folder: Path) -> None:
    graph, read = qwen(), tensors_of(folder)
    assert read.keys() == {name for name, info in graph.tensors().items() if info.saved}
    assert all(torch.equal(value, graph.tensor(name)) for name, value in read.items())


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(weight_files(tmp_path)) > 1
    assert all(torch.equal(value, qwen().tensor(name)) for name, value in tensors_of(tmp_path).items())


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path, max_shard_size="20KB")
    shards = weight_files(tmp_path)
    shards[1].unlink()
    assert errors(capture, str(tmp_path)) == (
        f"{tmp_path} lacks 1 of {len(shards)} weight files: {shards[1].name}\n  fix    fetch the missing shards"
    )


@pytest.mark.parametrize("index", ["", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "\x00", "[" * 100_000])
def test_a_damaged_index_is_named(index: str, folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    path.write_text(index)
    assert errors(open_checkpoint, str(folder)) == f"{path} is damaged\n  fix    fetch the checkpoint again"


def test_a_missing_tensor_is_named_with_the_nearest_there_is(folder: Path) -> None:
    rewrite(folder, **{"model.norm.weight": None, "model.norms.weight": torch.ones(32)})
    assert errors(tensors_of, folder) == (
        f"{folder} lacks 1 of 26 tensors: model.norm.weight, … (the nearest it has is model.norms.weight)\n"
        "  fix    the folder does not hold the weights that its config.json describes; fetch it again"
    )


def test_a_tensor_of_another_shape_is_named(folder: Path) -> None:
    rewrite(folder, **{"model.norm.weight": torch.ones(31)})
    assert errors(tensors_of, folder) == (
        f"{folder / 'model.safetensors'} holds model.norm.weight as [31], config.json wants [32]\n"
        "  fix    config.json and the weights do not belong together; fetch both again"
    )


def test_integers_in_the_place_of_floats_are_named(folder: Path) -> None:
    rewrite(folder, **{"model.norm.weight": torch.ones(32, dtype=torch.int32)})
    assert errors(tensors_of, folder) == (
        f"{folder / 'model.safetensors'} holds model.norm.weight as int32, the model wants float32\n"
        "  fix    config.json and the weights do not belong together; fetch both again"
    )


def test_a_tensor_in_two_files_is_named(folder: Path) -> None:
    shutil.copyfile(folder / "model.safetensors", folder / "other.safetensors")
    assert errors(open_checkpoint, str(folder)) == (
        f"model.embed_tokens.weight lies in both {folder / 'model.safetensors'} and {folder / 'other.safetensors'}\n"
        "  fix    remove the file that does not belong to the model"
    )


def test_nan_in_a_weight_is_named_when_it_is_read(folder: Path) -> None:
    rewrite(folder, **{"model.norm.weight": torch.full((32,), torch.nan)})
    graph = capture(str(folder))
    assert errors(graph.tensor, "model.norm.weight") == (
        f"model.norm.weight in {folder / 'model.safetensors'} holds NaN or infinity\n"
        "  fix    fetch the checkpoint again, or repair the model"
    )
    assert errors(graph.materialize) == errors(graph.tensor, "model.norm.weight")


def test_a_value_beyond_the_dtype_asked_for_is_named(folder: Path) -> None:
    rewrite(folder, **{"model.norm.weight": torch.full((32,), 1e5)})
    assert errors(capture(str(folder), dtype=torch.float16).tensor, "model.norm.weight") == (
        f"model.norm.weight in {folder / 'model.safetensors'} holds 100000, and the largest f16 number is 65504\n"
        "  fix    set dtype to bf16 or fp32"
    )


def test_weights_that_are_only_a_pickle_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")
    assert errors(capture, str(folder)) == (
        f"{folder} has its weights only as a pickle (pytorch_model.bin), which qc never reads\n"
        "  fix    save the model as safetensors: model.save_pretrained(folder, safe_serialization=True)"
    )
    (folder / "pytorch_model.bin").unlink()
    assert errors(capture, str(folder)) == (
        f"{folder} has no *.safetensors\n  fix    give a folder with weights, or use qc check, which needs none"
    )


def test_a_model_that_is_said_to_be_packed_and_is_not_is_refused(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": {"quant_method": "fp8"}}))
    assert errors(capture, str(folder)) == (
        f"{folder}: config.json says that fp8 has packed the weights, and no packed one is there\n"
        "  fix    fetch the checkpoint again, or take quantization_config out of config.json"
    )
    assert errors(open_checkpoint, str(folder)) == (
        f"{folder} is quantized already (fp8), and float weights are wanted\n"
        "  fix    give the model before it was quantized"
    )


def test_a_folder_that_is_not_there_is_met_with_the_nearest(folder: Path) -> None:
    assert errors(locate, f"{folder.parent}/modle") == (
        f"no model folder {folder.parent}/modle\n  fix    did you mean {folder}?"
    )


def test_sizes_that_contradict_each_other_are_named(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(settings | {"num_key_value_heads": 3}))
    assert errors(capture, str(folder)).startswith("the sizes in config.json do not go together: ")


@pytest.mark.parametrize("in_memory", [True, False])
def test_an_op_that_torch_lacks_here_is_an_error_without_a_traceback(
    in_memory: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    config = MixtralConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=50, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    assert errors(capture, MixtralForCausalLM(config) if in_memory else config) == (
        "the model cannot be captured: \"histogram_cpu\" not implemented for 'torch.int32'\n"
        "  site   model.layers.0.mlp.experts/histc\n"
        "  fix    see docs/models.md for the architectures that work"
    )
    assert "Traceback" not in capfd.readouterr().err


def test_a_flipped_byte_in_a_header_is_an_error_or_changes_nothing(folder: Path) -> None:
    path, generator = folder / "model.safetensors", random.Random(0)
    content, wanted = path.read_bytes(), tensors_of(folder)
    end, free = 8 + struct.unpack("<Q", content[:8])[0], content.index(b'"format"')
    caught = 0
    for _ in range(60):
        at = generator.randrange(end)
        path.write_bytes(content[:at] + bytes([content[at] ^ generator.randrange(1, 256)]) + content[at + 1 :])
        try:
            read = tensors_of(folder)
        except QcError:
            caught += 1
        else:  # the metadata is free text, of which nothing is read
            assert free <= at < free + len(b'"format":"pt"')
            assert all(torch.equal(read[name], value) for name, value in wanted.items())
    assert caught >= 58


def test_a_folder_cut_short_anywhere_is_an_error(folder: Path) -> None:
    path, generator = folder / "model.safetensors", random.Random(1)
    content = path.read_bytes()
    for length in (0, 7, 8, len(content) - 1, *(generator.randrange(len(content)) for _ in range(10))):
        path.write_bytes(content[:length])
        with pytest.raises(QcError):
            tensors_of(folder)


def test_a_flipped_byte_in_the_configuration_is_no_traceback(folder: Path) -> None:
    path, generator = folder / "config.json", random.Random(2)
    content, caught = path.read_bytes(), 0
    for _ in range(60):
        at = generator.randrange(len(content))
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << generator.randrange(8)]) + content[at + 1 :])
        try:
            read_config(folder)
        except QcError:
            caught += 1
    assert caught > 10
