"""An export for ONNX Runtime at the front door: checked, written, verified, and asked for text."""

from __future__ import annotations

from pathlib import Path

import pytest

from qc.compiling import plan
from recipes.load import load
from recipes.shipped import shipped
from runtimes.export import obstacles
from tests.qc.command import answer, qc

RECIPE = """
model: tiny
passes:
  - quantize-base: {scheme: int8}
export:
  - {target: onnx, dtype: fp32, kv: true}
"""


@pytest.fixture(scope="module")
def exported(folder: Path) -> tuple[str, Path]:
    """The artifact of a run and the export that was made of it."""
    (folder / "onnx.yaml").write_text(RECIPE)
    done = qc("compile", "onnx.yaml", cwd=folder)
    assert done.code == 0, done.err
    artifact = done.out.strip().splitlines()[-1]
    made = qc("export", artifact, "--target", "onnx", "--dtype", "fp32", "--kv", "true", "--json", cwd=folder)
    found = answer(made)
    assert found["export/psnr_db"] >= 90 and found["top1"] == 1
    assert "ok    on text" in made.err
    return artifact, folder / found["folder"]


def test_verify_says_a_line_for_everything(exported: tuple[str, Path], folder: Path) -> None:
    done = qc("verify", str(exported[1]), "--artifact", exported[0], cwd=folder)
    assert done.code == 0, done.err
    assert [line[:2] for line in done.out.splitlines()] == ["ok"] * 11


def test_a_spoiled_model_ends_with_4(exported: tuple[str, Path], folder: Path) -> None:
    path = exported[1] / "model.onnx"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    done = qc("verify", str(exported[1]), "--artifact", exported[0], cwd=folder)
    path.write_bytes(content)
    assert done.code == 4
    assert "model.onnx is not what was written: its hash is wrong" in done.err


def test_generate_answers_from_the_model(exported: tuple[str, Path], folder: Path) -> None:
    asked = ("generate", "-p", "ab", "--max-tokens", "6", "--json", "--artifact")
    ours = answer(qc(*asked, str(exported[1]), cwd=folder))
    theirs = answer(qc(*asked, exported[0], cwd=folder))
    assert ours["text"] == theirs["text"]


@pytest.mark.parametrize(
    ("line", "what", "fix"),
    [
        ("{target: onnx, kv: io}", "kv is 'io', and the target onnx takes true or false", "set kv to true, or take it out"),
        ("{target: onnx, dtype: bf16}", "ONNX Runtime computes in fp32 or fp16, not bf16",
         "set dtype to one of them, or take it out"),
        ("{target: onnx, context: 64}", "context belongs to the target ane", "take context out"),
    ],
)  # fmt: skip
def test_check_says_what_onnx_does_not_take(line: str, what: str, fix: str, folder: Path) -> None:
    (folder / "wrong.yaml").write_text(f"model: tiny\nexport:\n  - {line}\n")
    done = qc("check", "wrong.yaml", cwd=folder)
    assert done.code == 1
    assert what in done.err and f"fix    {fix}" in done.err


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, _ in shipped()])
def test_every_shipped_recipe_of_one_model_can_be_exported_with_a_past(name: str) -> None:
    graph, errors = plan(load(name))
    joint = ["the graph joins encoder and decoder, and onnx holds one model"] if name.startswith("awareness") else []
    assert errors == [] and [error.what for error in obstacles("onnx", graph, "fp16", {"kv": True})] == joint
