"""An export for the Neural Engine at the front door: written, verified, linted, and asked for text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qc.speaking import open_speaker
from runtimes.coreml.meta import read_meta
from runtimes.sampling import Sampling
from tests.qc.command import answer, qc
from tests.runtimes.coreml.exports import decoder_graph, write

RECIPE = """
model: tiny
passes:
  - quantize-base: {scheme: lut, lut: {bits: 4, scale: channel}}
export:
  - {target: ane, context: 32, prefill: 8}
"""


@pytest.fixture(scope="module")
def exported(folder: Path) -> tuple[str, Path]:
    """The artifact of a run and the export that was made of it."""
    (folder / "ane.yaml").write_text(RECIPE)
    done = qc("compile", "ane.yaml", cwd=folder)
    assert done.code == 0, done.err
    artifact = done.out.strip().splitlines()[-1]
    made = qc("export", artifact, "--target", "ane", "--context", "32", "--prefill", "8", "--json", cwd=folder)
    found = answer(made)
    assert found["export/psnr_db"] >= 40 and 0.9 <= found["top1"] <= 1
    assert "ok    in ane arithmetic" in made.err and "ok    greedy tokens" in made.err
    return artifact, folder / found["folder"]


@pytest.mark.slow
def test_verify_says_a_line_for_everything(exported: tuple[str, Path], folder: Path) -> None:
    done = qc("verify", str(exported[1]), "--artifact", exported[0], cwd=folder)
    assert done.code == 0, done.err
    assert [line[:2] for line in done.out.splitlines()] == ["ok"] * 7


def test_a_spoiled_package_ends_with_4(exported: tuple[str, Path], folder: Path) -> None:
    path = exported[1] / "head.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    done = qc("verify", str(exported[1]), "--artifact", exported[0], cwd=folder)
    path.write_bytes(content)
    assert done.code == 4
    assert "weight.bin is not what was written: its hash is wrong" in done.err


@pytest.mark.parametrize("given", ["", pytest.param("chunk_1.mlpackage", marks=pytest.mark.slow)])
def test_generate_answers_from_the_packages(given: str, exported: tuple[str, Path], folder: Path) -> None:
    asked = ("generate", "-p", "ab", "--max-tokens", "6", "--json", "--artifact")
    ours = answer(qc(*asked, str(exported[1] / given), cwd=folder))
    theirs = answer(qc(*asked, exported[0], cwd=folder))
    assert ours["text"] == theirs["text"]
    rounded = answer(qc(*asked, str(exported[1]), "--mode", "ane", cwd=folder))
    assert rounded["tokens"] == theirs["tokens"]


def test_a_mode_without_an_export_is_refused(exported: tuple[str, Path], folder: Path) -> None:
    done = qc("generate", "-p", "ab", "--mode", "fp16", "--artifact", exported[0], cwd=folder)
    assert done.code == 1
    assert done.err == ("error: --mode fp16 belongs to an export for the Neural Engine\n  fix    take --mode out\n")


def test_lint_says_rules_and_ends_with_1_on_errors(exported: tuple[str, Path], folder: Path) -> None:
    done = qc("lint", str(exported[1]), "--json", cwd=folder)
    found = json.loads(done.out)
    errors = {v["rule"] for v in found["violations"] if v["severity"] == "error"}
    assert errors == {"T2"}, found  # heads of 16 in a model of tests
    assert done.code == 1 and found["ok"] is False and found["traced"] is True
    told = qc("lint", str(exported[1] / "head.mlpackage"), "--chip", "m1-macos15", cwd=folder)
    assert told.code == 0, told.out
    assert told.out.splitlines()[0].split()[:2] == ["rule", "severity"]
    assert "1 packages, 40 rules for m1-macos15: 0 errors" in told.out
    assert told.out.rstrip().endswith("; values were not looked at")
    refused = qc("lint", "corpus", cwd=folder)
    assert refused.err == (
        "error: corpus holds no Core ML packages\n  fix    give an export for ane, or a .mlpackage\n"
    )


def test_a_text_ends_where_the_models_configuration_says_it_does(tmp_path: Path) -> None:
    graph = decoder_graph(num_hidden_layers=1, eos_token_id=[7, 9])
    folder = write(graph, tmp_path)
    (folder / "generation_config.json").unlink()
    assert read_meta(folder).eos == (7, 9)
    ended = open_speaker(str(folder), tmp_path, None, Sampling(max_tokens=12), False)
    assert ended.generator.eos == {7, 9}
    first = open_speaker(str(folder), tmp_path, None, Sampling(max_tokens=1), False).generator(
        [[1]], Sampling(max_tokens=1)
    )
    data = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(data | {"eos": [first.rows[0].ids[0]]}))
    told = open_speaker(str(folder), tmp_path, None, Sampling(max_tokens=12), False).say("b", stream=False)
    assert (told["finish"], told["tokens"]) == ("eos", 1)
