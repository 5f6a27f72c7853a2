"""The artifact: what is written comes back bit for bit, what is damaged is named, and nothing appears by halves."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graph import Graph, QcError, Selector, TensorInfo, capture_module
from graph.artifact import Artifact, load, save, sealed
from graph.formats import FourBit, store_packed
from graph.hashes import recorded, sha256
from graph.probe import probe_inputs
from graph.weights import read_header
from tests.graph.tiny import qwen

DAMAGED = "the artifact is damaged; compile the recipe again"


def packed(dtype: torch.dtype = torch.float32) -> Graph:
    """A graph with integers, float side tensors, a pinned buffer and tied weights."""
    graph, form = qwen(1), FourBit("nf4", 32)
    for name in graph.tensors():
        graph.set_tensor(name, graph.tensor(name).detach().clone())
    for site in Selector(role="mlp.*").pick(graph.sites("aten.linear"), graph.blocks):
        name = str(site.weight())
        store_packed(graph, name, form, form.pack(graph.tensor(name)))
    graph.set_info("model.norm.weight", trainable=True, group="norms")
    return graph.to(dtype)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact that no test may change."""
    folder = tmp_path_factory.mktemp("artifacts") / "written"
    tokenizer = tmp_path_factory.mktemp("tokenizer")
    (tokenizer / "tokenizer.json").write_text("{}\n")
    (tokenizer / "model.bin").write_text("no part of a tokenizer\n")
    texts = {"recipe.yaml": "model: ./tiny  # grüße\n", "passes/01-quantize-base.txt": "…\n"}
    save(folder, packed(), texts=texts, tokenizer=tokenizer, parent="abc", about={"seed": 7}, max_shard=20_000)
    return folder


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(written, tmp_path / "copy"))


def message(folder: Path) -> str:
    with pytest.raises(QcError) as caught:
        load(folder)
    return str(caught.value)


def reseal(folder: Path) -> None:
    """Make the manifest true again, as someone would who edits an artifact by hand."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for name, entry in manifest["files"].items():
        entry |= recorded(folder / name)
    (folder / "manifest.json").write_bytes(sealed(manifest))


# -- what is written comes back -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_graph_comes_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    graph = packed(dtype)
    back = save(tmp_path / "a", graph).graph
    assert str(back) == str(graph)
    assert back.tensors() == graph.tensors()
    assert (back.kind, back.dtype, back.blocks, back.config) == (graph.kind, dtype, graph.blocks, graph.config)
    for name in graph.tensors():
        was, now = graph.tensor(name).detach(), back.tensor(name)
        assert now.dtype == was.dtype
        assert torch.equal(now, was), name
    inputs = probe_inputs(graph)
    assert torch.equal(back(**inputs), graph(**inputs))


def test_saving_what_was_loaded_writes_the_same_bytes(written: Path, tmp_path: Path) -> None:
    graph = load(written).graph
    first, second = save(tmp_path / "a", graph), save(tmp_path / "b", graph.materialize())
    assert first.digest == second.digest
    assert sha256(first.folder / "graph.json") == sha256(written / "graph.json")


def test_tied_weights_are_one_tensor_on_disk(written: Path) -> None:
    held = [name for path in written.glob("*.safetensors") for name in read_header(path)]
    assert held.count("model.embed_tokens.weight") == 1
    assert "lm_head.weight" not in held
    assert load(written).graph.info("model.embed_tokens.weight").aliases == ("lm_head.weight",)


def test_recipe_tokenizer_and_manifest_are_carried_along(written: Path) -> None:
    artifact = load(written)
    assert (written / "recipe.yaml").read_text(encoding="utf-8") == "model: ./tiny  # grüße\n"
    assert (written / "passes" / "01-quantize-base.txt").is_file()
    assert artifact.tokenizer == written / "tokenizer"
    assert [p.name for p in (written / "tokenizer").iterdir()] == ["tokenizer.json"]
    assert artifact.manifest["parent"] == "abc"
    assert artifact.manifest["seed"] == 7
    assert set(artifact.manifest["files"]) == {
        str(p.relative_to(written)) for p in written.rglob("*") if p.is_file() and p.name != "manifest.json"
    }
    assert len(list(written.glob("weights-*.safetensors"))) > 1


def test_loading_unpickles_nothing(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a pickle was read")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(owner, name, refuse)
    graph = load(written).graph.materialize()
    assert not graph.lazy()


def test_a_streaming_graph_computes_what_the_materialized_one_does(written: Path) -> None:
    streaming, whole = load(written).graph, load(written).graph.materialize()
    inputs = probe_inputs(whole, batch=3, length=11)
    assert streaming.lazy()
    assert torch.equal(streaming(**inputs), whole(**inputs))
    assert streaming.lazy() == load(written).graph.lazy(), "streaming keeps nothing"


# -- what is damaged is named ---------------------------------------------------------------------------------------


def test_a_flipped_byte_anywhere_is_an_error(copy: Path) -> None:
    generator = random.Random(0)
    files = sorted(p for p in copy.rglob("*") if p.is_file())
    for number in range(60 + len(files)):
        path = files[number % len(files)]
        content = path.read_bytes()
        at = generator.randrange(len(content))
        path.write_bytes(content[:at] + bytes([content[at] ^ generator.randrange(1, 256)]) + content[at + 1 :])
        with pytest.raises(QcError):
            load(copy)
        path.write_bytes(content)
    load(copy)


def test_a_file_cut_short_anywhere_is_an_error(copy: Path) -> None:
    generator = random.Random(1)
    for path in sorted(p for p in copy.rglob("*") if p.is_file()):
        content = path.read_bytes()
        for length in (0, generator.randrange(len(content)), len(content) - 1):
            path.write_bytes(content[:length])
            with pytest.raises(QcError):
                load(copy)
        path.write_bytes(content)
    load(copy)


def test_a_missing_file_is_named(copy: Path) -> None:
    (copy / "graph.txt").unlink()
    assert message(copy) == f"{copy / 'graph.txt'} is missing\n  fix    {DAMAGED}"


def test_a_file_of_another_size_is_named(copy: Path) -> None:
    (copy / "recipe.yaml").write_text("model: ./other\n")
    assert message(copy) == f"{copy / 'recipe.yaml'} has 15 bytes, the manifest says 25\n  fix    {DAMAGED}"


def test_a_changed_weight_file_is_named(copy: Path) -> None:
    path = sorted(copy.glob("*.safetensors"))[0]
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert message(copy) == f"{path} is not what was written: its hash is wrong\n  fix    {DAMAGED}"


def test_a_changed_file_is_named_before_what_is_wrong_in_it(copy: Path) -> None:
    path = copy / "graph.json"
    path.write_bytes(path.read_bytes()[:-2] + b" \n")
    with pytest.raises(QcError, match="cannot be read"):
        load(copy, check_hashes=False)
    assert message(copy) == f"{path} is not what was written: its hash is wrong\n  fix    {DAMAGED}"


def test_an_artifact_of_before_is_held_to_its_sha256(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_bytes())
    for name, entry in manifest["files"].items():
        assert entry.pop("blake3")
        entry["sha256"] = sha256(copy / name)
    (copy / "manifest.json").write_bytes(sealed(manifest))
    assert load(copy).graph.tensors()
    (copy / "graph.txt").write_bytes((copy / "graph.txt").read_bytes()[:-1] + b" ")
    assert message(copy) == f"{copy / 'graph.txt'} is not what was written: its hash is wrong\n  fix    {DAMAGED}"


def test_an_edited_manifest_is_damaged(copy: Path) -> None:
    path = copy / "manifest.json"
    path.write_text(path.read_text().replace('"seed": 7', '"seed": 8'))
    assert message(copy) == f"{path} is damaged\n  fix    {DAMAGED}"


def test_weights_that_the_manifest_does_not_list_are_refused(copy: Path) -> None:
    shutil.copyfile(sorted(copy.glob("*.safetensors"))[0], copy / "weights-more.safetensors")
    assert message(copy) == (
        f"{copy / 'weights-more.safetensors'} is not in the manifest\n"
        "  fix    remove the file; an artifact is never changed in place"
    )


def test_another_version_is_named(copy: Path) -> None:
    path = copy / "manifest.json"
    path.write_bytes(sealed(json.loads(path.read_bytes()) | {"version": 9}))
    assert message(copy) == f"{copy} has version 9, this qc reads 1\n  fix    compile the recipe again"


def test_what_is_no_artifact_is_explained(tmp_path: Path) -> None:
    assert message(tmp_path / "none") == (
        f"no artifact {tmp_path / 'none'}\n  fix    run qc compile first, or give the folder of an artifact"
    )
    assert message(tmp_path) == (
        f"{tmp_path} is not an artifact: it has no manifest.json\n"
        "  fix    give a folder that qc compile or qc train wrote"
    )


def test_an_op_that_is_not_allowed_is_refused_before_anything_runs(copy: Path) -> None:
    path = copy / "graph.json"
    data = json.loads(path.read_bytes())
    data["nodes"][-1]["op"] = "os.system"
    path.write_text(json.dumps(data))
    reseal(copy)
    assert message(copy) == (
        f"{path}: the op 'os.system' at lm_head is not allowed in a graph\n"
        "  fix    compile the recipe again; artifacts are not edited by hand"
    )


def test_a_pickle_offered_as_weights_is_refused(copy: Path) -> None:
    path = sorted(copy.glob("*.safetensors"))[0]
    torch.save({"w": torch.ones(3)}, path)
    reseal(copy)
    assert message(copy) == (
        f"{path} is a pickle, which qc never reads\n  fix    convert the checkpoint to safetensors"
    )


def test_nan_in_a_weight_is_named_when_it_is_read(tmp_path: Path) -> None:
    graph = capture_module(nn.Linear(4, 4), torch.ones(1, 4))
    graph.set_tensor("weight", torch.full((4, 4), torch.nan))
    artifact = save(tmp_path / "a", graph)
    with pytest.raises(QcError) as caught:
        artifact.graph(torch.ones(1, 4))
    assert str(caught.value) == (
        f"weight in {tmp_path / 'a' / 'weights.safetensors'} holds NaN or infinity\n"
        "  fix    fetch the checkpoint again, or repair the model"
    )


# -- nothing by halves, nothing overwritten -------------------------------------------------------------------------


def small() -> Graph:
    """Three tensors, quick to write."""
    graph = capture_module(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), torch.ones(2, 64))
    graph.add_tensor(
        "0.count", torch.arange(5), before=graph.sites()[0].node, info=TensorInfo(kind="buffer", pinned=True)
    )
    return graph


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine.txt").write_text("mine")
    with pytest.raises(QcError) as caught:
        save(tmp_path / "a", small())
    assert str(caught.value) == (
        f"{tmp_path / 'a'} is already there\n  fix    give another folder, or remove it first: nothing is overwritten"
    )
    assert [p.name for p in tmp_path.rglob("*")] == ["a", "mine.txt"]


def test_an_empty_folder_may_become_the_artifact(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert save(tmp_path / "a", small()).graph.tensors() == small().tensors()


def test_a_file_in_the_place_of_a_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(QcError, match="is already there"):
        save(tmp_path / "file", small())
    with pytest.raises(QcError) as caught:
        save(tmp_path / "file" / "a", small())
    assert (
        str(caught.value)
        == f"writing {tmp_path / 'file' / 'a'} failed: File exists\n  fix    check the path and the disk"
    )
    assert (tmp_path / "file").read_text() == "mine"


def test_a_place_that_cannot_be_written_is_named() -> None:
    with pytest.raises(QcError) as caught:
        save(Path("/proc/self/a"), small())
    assert (
        str(caught.value)
        == "writing /proc/self/a failed: No such file or directory\n  fix    check the path and the disk"
    )


def test_a_read_only_place_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)  # root may write everywhere
    with pytest.raises(QcError) as caught:
        save(tmp_path / "a", small())
    assert str(caught.value) == (
        f"{tmp_path / 'a'} cannot be written: Permission denied\n  fix    give a folder that you may write to"
    )


@contextlib.contextmanager
def full_disk(folder: Path, room: int) -> Iterator[Path]:
    """A folder on a disk with ``room`` bytes; where none can be mounted, files may not grow beyond it."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", folder], check=False, capture_output=True
    )
    if mounted.returncode == 0:
        try:
            yield folder
        finally:
            subprocess.run(["umount", folder], check=True)
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield folder
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [4096, 24_576, 36_864])
def test_a_full_disk_leaves_nothing_behind(room: int, tmp_path: Path) -> None:
    with full_disk(tmp_path / "disk", room) as disk:
        with pytest.raises(QcError) as caught:
            save(disk / "a", small())
        assert list(disk.iterdir()) == []
    assert str(caught.value) == (
        f"no room left to write {tmp_path / 'disk' / 'a'}\n"
        "  fix    free some space, or write to another disk; nothing was left behind"
    )


# -- kills ----------------------------------------------------------------------------------------------------------


FORKS = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def killed(folder: Path, graph: Graph, delay: float) -> None:
    """Save in another process, and kill that after ``delay`` seconds."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            save(folder, graph)
        os._exit(0)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def assert_whole_or_absent(folder: Path, wanted: Artifact) -> None:
    if folder.exists():
        assert load(folder).digest == wanted.digest
        shutil.rmtree(folder)


@FORKS
def test_ten_kills_leave_no_half_artifact_and_the_next_run_writes_the_same(tmp_path: Path) -> None:
    graph, generator, folder = small(), random.Random(0), tmp_path / "a"
    start = time.perf_counter()
    wanted = save(tmp_path / "undisturbed", graph)
    whole = time.perf_counter() - start
    for _ in range(10):
        killed(folder, graph, generator.uniform(0, whole))
        assert_whole_or_absent(folder, wanted)
    assert save(folder, graph).digest == wanted.digest
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "undisturbed"], (
        "what killed processes leave is swept away"
    )


@FORKS
def test_a_kill_ahead_of_the_last_rename_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        os.replace = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
        with contextlib.suppress(BaseException):
            save(tmp_path / "a", small())
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not (tmp_path / "a").exists()
    assert [p.name for p in tmp_path.iterdir()] == [f".a.tmp-{child}"]
    save(tmp_path / "a", small())
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
