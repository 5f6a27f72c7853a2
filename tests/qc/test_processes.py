"""Compiling in two processes gives the bytes of one, whatever is packed, and leaves nothing but the artifact."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from graph.hashes import sha256
from tests.qc.command import Done, answer, killed, qc

RECIPE = """
model: tiny
passes:
  - calibrate: {data: {text: corpus/*.txt}, tokens: 256, length: 16, batch: 2}
  - PASS
"""

PASSES = {
    "lut": "quantize-base: {scheme: lut, lut: {bits: 2, rank: 4, group: 16}, keep: {share: 0.2}}",
    "nf4": "quantize-base: {scheme: nf4, double_quant: true}",
    "ternary": "ternary-ste: {tau: 0.7, scale: least-squares, keep: {share: 0.2}}\n  - freeze-ternary",
}


@pytest.fixture
def project(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder / "tiny", tmp_path / "tiny")
    shutil.copytree(folder / "corpus", tmp_path / "corpus")
    return tmp_path


def compiled(project: Path, name: str, processes: int) -> Done:
    (project / "recipe.yaml").write_text(RECIPE.replace("PASS", PASSES[name]))
    runs, threads = f"runs-{processes}", {"OMP_NUM_THREADS": "1"}
    return qc(
        "compile", "recipe.yaml", "--runs", runs, "--processes", str(processes), "--json", cwd=project, env=threads
    )


@pytest.mark.parametrize("name", ["ternary", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lut", "nf4"))])
def test_two_processes_give_the_bytes_of_one(project: Path, name: str) -> None:
    one, two = (Path(project, answer(compiled(project, name, processes))["artifact"]) for processes in (1, 2))
    files = [path.name for path in one.iterdir() if path.is_file() and path.name != "manifest.json"]
    assert "weights.safetensors" in files and "graph.json" in files
    assert [sha256(two / file) for file in files] == [sha256(one / file) for file in files]
    reports = [json.loads((folder / "manifest.json").read_text())["reports"] for folder in (one, two)]
    assert [[r["changed"], r["figures"], r["weighed"]] for r in reports[0]] == [
        [r["changed"], r["figures"], r["weighed"]] for r in reports[1]
    ]
    assert not list(project.glob("runs-2/.cache/*.parts"))


@pytest.mark.slow
def test_a_compile_that_was_killed_goes_on_and_gives_the_same_bytes(project: Path) -> None:
    wanted = Path(project, answer(compiled(project, "nf4", 1))["artifact"])
    command = ("compile", "recipe.yaml", "--runs", "runs-2", "--processes", "2")
    assert killed(*command, cwd=project, sign="runs-2/.cache/*.parts/pack-0/*.safetensors", delay=0)
    assert list(project.glob("runs-2/.cache/*.parts/pack-0/*.safetensors"))
    assert not list(project.glob("runs-2/recipe/*/compiled"))
    found = Path(project, answer(compiled(project, "nf4", 2))["artifact"])
    assert sha256(found / "weights.safetensors") == sha256(wanted / "weights.safetensors")
    assert not list(project.glob("runs-2/.cache/*.parts"))


@pytest.mark.slow
def test_processes_that_a_launcher_started_divide_the_work_and_the_first_writes(project: Path) -> None:
    wanted = Path(project, answer(compiled(project, "nf4", 1))["artifact"])

    def launched(rank: int) -> Done:
        env = {"RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        return qc("compile", "recipe.yaml", "--runs", "both", "--json", cwd=project, env=env)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(launched, (0, 1))
    assert (second.code, second.out) == (0, ""), second.err
    found = Path(project, answer(first)["artifact"])
    assert sha256(found / "weights.safetensors") == sha256(wanted / "weights.safetensors")
    assert not list(project.glob("both/.cache/*.parts"))


def test_a_check_says_that_a_compile_decides_what_is_kept(project: Path) -> None:
    (project / "recipe.yaml").write_text(RECIPE.replace("PASS", PASSES["ternary"]))
    done = qc("check", "recipe.yaml", cwd=project)
    assert done.code == 0, done.err
    assert done.out.rstrip().endswith("; which weights ternary-ste leaves as they are is decided in the compile")


@pytest.mark.slow
def test_a_mistake_that_a_helper_finds_is_told_once_as_one_process_tells_it(project: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = project / "tiny" / "model.safetensors"
    tensors = load_file(file)
    for name, value in tensors.items():
        if "layers.1" in name:
            value.view(-1)[0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    one, two = (compiled(project, "nf4", processes) for processes in (1, 2))
    assert one.code == two.code == 1
    assert json.loads(one.out) == json.loads(two.out)
    assert "holds NaN or infinity" in two.out and "Traceback" not in two.err
    assert not list(project.glob("runs-2/*/*/compiled"))
