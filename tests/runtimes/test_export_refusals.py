"""What cannot be exported is a named error, leaves nothing behind and touches nothing that was there."""

from __future__ import annotations

import math
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from graph import Graph, QcError, TensorInfo, capture
from runtimes.export.safetensors import Dtype, export
from tests.architectures import config
from tests.runtimes.test_export_safetensors import graph, stored


def nothing_left(folder: Path) -> bool:
    return not list(folder.iterdir())


def with_value(number: float, name: str = "model.layers.1.mlp.up_proj.weight") -> Graph:
    broken = graph()
    value = broken.tensor(name).detach().clone()
    value[3, 1] = number
    broken.set_tensor(name, value)
    return broken


@pytest.mark.parametrize(
    ("number", "dtype", "text"),
    [
        (70000.0, "fp16", "holds 70000, beyond the 65504 of fp16\n  site   {0}\n  fix    export with dtype bf16, which reaches as far as fp32"),
        (-65505.0, "fp16", "holds -65505, beyond the 65504 of fp16\n  site   {0}\n  fix    export with dtype bf16, which reaches as far as fp32"),
        (math.nan, "fp32", "holds nan\n  site   {0}\n  fix    a weight is broken: export an earlier checkpoint, or train with a lower lr"),
        (-math.inf, "bf16", "holds -inf\n  site   {0}\n  fix    a weight is broken: export an earlier checkpoint, or train with a lower lr"),
        (3.4e38, "bf16", "holds 3.4e+38, beyond the 3.38953e+38 of bf16\n  site   {0}\n  fix    export with dtype fp32"),
    ],
)  # fmt: skip
def test_a_number_that_does_not_survive_is_named_and_nothing_is_left(
    number: float, dtype: Dtype, text: str, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(QcError) as caught:
        export(with_value(number), tmp_path / "out", dtype=dtype)
    assert str(caught.value) == f"{name} " + text.format(name)
    assert nothing_left(tmp_path)


def test_65504_itself_survives(tmp_path: Path) -> None:
    export(with_value(65504.0), tmp_path / "out", dtype="fp16")
    assert stored(tmp_path / "out")["model.layers.1.mlp.up_proj.weight"][3, 1] == 65504


def unmerged() -> Graph:
    made = graph()
    site = made.site("model.layers.0.mlp.up_proj")
    info = TensorInfo(trainable=True, group="lora.default", role="lora.a")
    after = site.node.next
    a = made.add_tensor("model.layers.0.mlp.up_proj.lora_A.default.weight", torch.ones(4, 32), before=after, info=info)
    b = made.add_tensor("model.layers.0.mlp.up_proj.lora_B.default.weight", torch.ones(64, 4), before=after, info=info)
    users = list(site.node.users)
    end = made.insert("qc.lora", site.node, site.input(0), a, b, 8.0, name="up/lora", before=after, role="lora.update")
    for user in users:
        user.replace_input_with(site.node, end)
    made.verify()
    return made


def foreign() -> Graph:
    made = graph()
    end = made.site("lm_head")
    gate = made.add_tensor("model.gate", torch.ones(1), before=end.node, info=TensorInfo())
    end.set_input(0, made.insert("aten.mul.Tensor", end.input(0), gate, name="gated", before=end.node))
    made.verify()
    return made


def lacking() -> Graph:
    made = graph()
    site = made.site("model.norm")
    site.node.replace_all_uses_with(site.input(0))
    made.module.graph.eliminate_dead_code()
    made.remove_tensor("model.norm.weight")
    made.verify()
    return made


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (unmerged, "LoRA is not merged at 1 sites\n  site   up/lora\n  fix    add merge-lora before the export"),
        (foreign, "a qwen3 checkpoint has no place for model.gate\n  fix    take out, or merge, what a pass added; or export to another target"),
        (lacking, "the graph has no model.norm.weight\n  fix    a pass took away what the architecture needs; leave it out, or export to another target"),
        (lambda: capture(config("qwen3"), kind="causal-lm"), "the graph has no weights\n  fix    capture a model folder, not a configuration"),
    ],
)  # fmt: skip
def test_a_graph_that_is_no_checkpoint_is_refused(make: Callable[[], Graph], text: str, tmp_path: Path) -> None:
    with pytest.raises(QcError) as caught:
        export(make(), tmp_path / "out")
    assert str(caught.value) == text
    assert nothing_left(tmp_path)


def test_everything_missing_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(QcError) as caught:
        export(unmerged(), tmp_path / "out", source=tmp_path / "nowhere", tokenizer=tmp_path / "empty")
    assert str(caught.value) == (
        "LoRA is not merged at 1 sites\n  site   up/lora\n  fix    add merge-lora before the export\n\n"
        f"there is no model folder {tmp_path / 'nowhere'}\n  fix    check the path\n\n"
        f"{tmp_path / 'empty'} has no tokenizer\n  fix    give the folder that holds tokenizer.json\n\n"
        f"{tmp_path / 'out'} is already there\n  fix    give another folder, or remove it first: nothing is overwritten"
    )
    assert (tmp_path / "out" / "precious").read_text() == "x"


def test_force_replaces_the_folder_only_when_the_new_one_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("x")
    with pytest.raises(QcError):
        export(with_value(math.nan), out, force=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]
    export(graph(), out, force=True)
    assert not (out / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "model.safetensors").is_file()


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A place with room for 64 KiB: a tmpfs where one may be mounted, else a limit on the size of files."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode == 0:
        try:
            yield folder
        finally:
            subprocess.run(["umount", str(folder)], check=True)
        return
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, old[1]))
    try:
        yield folder
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_full_disk_is_a_named_error_and_nothing_is_left(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        with pytest.raises(QcError) as caught:
            export(graph(), disk / "out", dtype="fp32")
        assert str(caught.value) == (
            f"no room left to write {disk / 'out'}\n"
            "  fix    free some space, or write to another disk; nothing was left behind"
        )
        assert nothing_left(disk)


def test_a_folder_that_cannot_be_made_is_a_named_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(QcError) as caught:
        export(graph(), tmp_path / "file" / "out")
    assert (
        str(caught.value)
        == f"writing {tmp_path / 'file' / 'out'} failed: File exists\n  fix    check the path and the disk"
    )
