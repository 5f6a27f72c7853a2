"""An export that is there already is taken only for what it is, and verified against what it was made of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import qc as api
from qc.exported import content_of
from tests.qc.command import answer, qc

PLAIN = "model: tiny\nname: plain\n"
OTHER = "model: tiny\nname: other\npasses:\n  - quantize-base: {scheme: int4, block: 32}\n"
TWO = "model: tiny\nname: two\nexport:\n  - {target: fp8}\n  - {target: fp8, scheme: tensor, weight_only: true}\n"


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, str]:
    """The artifacts of two recipes; the second is the latest run."""
    found = {}
    for name, text in (("plain", PLAIN), ("other", OTHER)):
        (folder / f"{name}.yaml").write_text(text)
        found[name] = answer(qc("compile", f"{name}.yaml", "--runs", "both", "--json", cwd=folder))["artifact"]
    return found


@pytest.fixture(scope="module")
def exported(runs: dict[str, str], folder: Path) -> str:
    """FP8 of the first, where its user wants it."""
    done = qc("export", runs["plain"], "-t", "fp8", "-o", "fp8", "--no-verify", cwd=folder)
    assert (done.code, done.out) == (0, "fp8\n")
    return "fp8"


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["-t", "fp8", "--scheme", "block"], "without scheme, and now with scheme block"),
        (["-t", "fp8", "--weight-only"], "without weight_only, and now with weight_only True"),
        (["-t", "fp8", "--dtype", "fp32"], "with dtype bf16, and now with dtype fp32"),
        (["-t", "int8"], "with target fp8, and now with target int8"),
    ],
)
def test_another_format_is_not_taken_for_the_one_that_is_there(
    options: list[str], what: str, exported: str, runs: dict[str, str], folder: Path
) -> None:
    done = qc("export", runs["plain"], *options, "-o", exported, "--no-verify", cwd=folder)
    fix = "give another folder with --out, or --force to replace it"
    assert (done.code, done.err) == (1, f"error: fp8 was exported {what} is asked for\n  fix    {fix}\n")


def test_an_export_of_another_artifact_is_not_taken_for_it(exported: str, runs: dict[str, str], folder: Path) -> None:
    before = (folder / exported / "qc-export.json").read_bytes()
    done = qc("export", runs["other"], "-t", "fp8", "-o", exported, "--no-verify", cwd=folder)
    assert done.code == 1
    assert done.err.startswith("error: fp8 is an export of another artifact\n")
    assert (folder / exported / "qc-export.json").read_bytes() == before


def test_the_same_asked_again_is_taken_and_force_replaces_it_by_another(
    exported: str, runs: dict[str, str], folder: Path
) -> None:
    shutil.copytree(folder / exported, folder / "again")
    again = qc("export", runs["plain"], "-t", "fp8", "-o", "again", "--no-verify", cwd=folder)
    assert (again.code, again.err) == (0, "exported before: again\n")
    forced = qc("export", runs["plain"], "-t", "int8", "-o", "again", "--force", "--no-verify", cwd=folder)
    assert forced.code == 0
    assert _about(folder / "again")["target"] == "int8"


def test_an_older_export_that_does_not_say_is_held_to_target_and_dtype(
    exported: str, runs: dict[str, str], folder: Path
) -> None:
    shutil.copytree(folder / exported, folder / "older")
    about = _about(folder / "older")
    del about["asked"]
    (folder / "older/qc-export.json").write_text(json.dumps(about))
    assert qc("export", runs["plain"], "-t", "fp8", "-o", "older", "--no-verify", cwd=folder).code == 0
    refused = qc("export", runs["plain"], "-t", "int8", "-o", "older", "--no-verify", cwd=folder)
    assert refused.err.startswith("error: older was exported with target fp8, and now with target int8 is asked for\n")


def test_verify_finds_the_artifact_that_the_export_was_made_of(
    exported: str, runs: dict[str, str], folder: Path
) -> None:
    assert content_of(_manifest(folder / runs["plain"])) == _about(folder / exported)["asked"]["artifact"]
    done = qc("verify", exported, "--runs", "both", cwd=folder)  # whose latest run is the other
    assert done.code == 0, done.err
    nowhere = qc("verify", exported, "--runs", "nothing", cwd=folder)
    what = "fp8 was made of an artifact that is not in nothing/"
    fix = "give its folder with --artifact, or the folder of all runs with --runs"
    assert (nowhere.code, nowhere.err) == (1, f"error: {what}\n  fix    {fix}\n")
    wrong = qc("verify", exported, "--artifact", runs["other"], cwd=folder)
    assert (wrong.code, "fp8 does not compute what" in wrong.err) == (4, True)


def test_formats_of_one_target_lie_in_folders_of_their_own(folder: Path) -> None:
    (folder / "two.yaml").write_text(TWO)
    done = answer(qc("run", "two.yaml", "--runs", "both", "--json", cwd=folder))
    found = {one["step"]: Path(one["folder"]).name for one in done["steps"] if "export" in one["step"]}
    wanted = {"export fp8 bf16": "export-fp8-bf16"}
    assert found == wanted | {"export fp8 tensor weight-only bf16": "export-fp8-tensor-weight-only-bf16"}


def test_python_writes_each_target_in_its_own_dtype(runs: dict[str, str], folder: Path) -> None:
    out = folder / "from-python"
    assert api.export(folder / runs["plain"], target="mxfp4", out=out, verify=False) == out
    assert _about(out)["dtype"] == "bf16"


def test_a_model_without_a_tokenizer_is_exported_and_verified(folder: Path) -> None:
    shutil.copytree(folder / "tiny", folder / "bare", ignore=shutil.ignore_patterns("*token*", "*.jinja"))
    (folder / "bare.yaml").write_text("model: bare\n")
    assert qc("compile", "bare.yaml", "--runs", "bare-runs", cwd=folder).code == 0
    done = qc("export", "-t", "nvfp4", "-o", "bare-nvfp4", "--runs", "bare-runs", cwd=folder)
    assert (done.code, "ok    tokenizer              none\n" in done.err) == (0, True), done.err
    assert qc("verify", "bare-nvfp4", "--runs", "bare-runs", cwd=folder).code == 0


def _about(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "qc-export.json").read_text())
    return found


def _manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found
