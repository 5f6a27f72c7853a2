"""Calls that need no run: what answers at once, what is wrong, and how either ends."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT
from tests.qc.command import answer, qc

# -- at once, without torch -----------------------------------------------------------------------------------------


def test_help_answers_within_0_3_s_of_cpu(tmp_path: Path) -> None:
    spent = []
    for _ in range(3):  # the least of three: a busy machine adds to the time of a process, never takes from it
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = _started("--help", cwd=tmp_path)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert (done.returncode, done.stderr) == (0, "")
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 0.3


@pytest.mark.parametrize("argv", [["--help"], ["recipes", "list"], ["schema"], ["train", "--help"]])
def test_help_recipes_and_schema_do_without_torch(argv: list[str], tmp_path: Path) -> None:
    done = _started(*argv, cwd=tmp_path, options=["-X", "importtime"])
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert done.stdout
    assert "qc" in imported
    assert not {"torch", "transformers", "numpy", "ruamel"} & imported


def _started(*argv: str, cwd: Path, options: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """``python -m qc``, as a user starts it."""
    command = [sys.executable, *options, "-m", "qc", *argv]
    return subprocess.run(command, cwd=cwd, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


def test_help_names_every_command_and_every_exit_code(tmp_path: Path) -> None:
    said = qc("--help", cwd=tmp_path).out
    commands = ["compile", "train", "export", "run", "check", "show", "diff", "generate", "eval", "verify", "schema"]
    assert [name for name in commands if f"\n  {name} " not in said] == []
    for code in ("0 done", "1 a mistake to fix", "2 a wrong call", "3 a gate failed", "4 an export is not"):
        assert code in " ".join(said.split())


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (
            ["--context", "64"],
            "error: --context belongs to the target ane\n  fix    take --context out, or add --target ane\n",
        ),
        (["--target", "ane", "--context", "0"], "error: --context is 0\n  fix    give a number from 1\n"),
        (["--target", "ane", "--prefill", "-1"], "error: --prefill is -1\n  fix    give a number from 0\n"),
        (["--target", "int4", "--kv-cache", "bf16"], "error: --kv-cache is bf16\n  fix    use one of fp8\n"),
        (["--target", "int4", "--group", "48"], "error: --group is 48\n  fix    use one of 32, 64, 128\n"),
        (["--target", "gguf", "--encoding", "q5_0"], "error: --encoding is q5_0\n  fix    use one of q8_0, q4_0\n"),
    ],
)
def test_options_of_a_target_stand_with_that_target(argv: list[str], text: str, tmp_path: Path) -> None:
    done = qc("export", *argv, cwd=tmp_path)
    assert (done.code, done.err) == (1, text)


def test_the_shipped_recipes_are_listed(tmp_path: Path) -> None:
    names = {"awareness", "awareness-degrade", "awareness-fp8", "awareness-int8", "fp16", "qlora", "quickstart"}
    found = answer(qc("recipes", "list", "--json", cwd=tmp_path))
    assert names <= {one["name"] for one in found}
    assert all(one.keys() == {"name", "about"} and one["about"] for one in found)


def test_a_shipped_recipe_is_copied_and_nothing_is_overwritten(tmp_path: Path) -> None:
    done = qc("recipes", "copy", "qlora", cwd=tmp_path)
    assert (done.code, done.out) == (0, "qlora.yaml\n")
    assert (tmp_path / "qlora.yaml").read_text() == (ROOT / "recipes/qlora.yaml").read_text()
    (tmp_path / "qlora.yaml").write_text("mine")
    again = qc("recipes", "copy", "qlora", cwd=tmp_path)
    assert (again.code, again.err) == (1, "error: qlora.yaml is already there\n  fix    give another file with --to\n")
    assert (tmp_path / "qlora.yaml").read_text() == "mine"


def test_schema_prints_the_shipped_json_schema(tmp_path: Path) -> None:
    assert qc("schema", cwd=tmp_path).out == (ROOT / "recipes/schema.json").read_text()


# -- exit codes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["compile"], "Error: Missing argument 'RECIPE'."),
        (["frobnicate"], "Error: No such command 'frobnicate'."),
        (["train", "--frobnicate"], "Error: No such option: --frobnicate"),
        (["eval", "--batches", "many"], "Error: Invalid value for '--batches': Input should be a valid integer"),
    ],
)
def test_a_wrong_call_ends_with_2_and_says_what_is_wrong(argv: list[str], said: str, tmp_path: Path) -> None:
    done = qc(*argv, cwd=tmp_path)
    assert (done.code, done.out) == (2, "")
    assert said in " ".join(done.err.split())


SILLY = [
    ("train", "there is no run in runs/", "run qc compile RECIPE first"),
    ("train nowhere", "nowhere is not a run of qc", "give a folder under runs/, or leave it out for the latest run"),
    ("export --target onyx", "no export target is called 'onyx'", "did you mean 'onnx'?"),
    ("export --target tflite", "no export target is called 'tflite'",
     "use one of: ane, bitnet, fp8, gguf, int2, int4, int8, mixed, mxfp4, mxfp8, nf4, nvfp4, onnx, safetensors, ternary"),
    ("export --dtype fp8", "'fp8' is no dtype to export", "use fp16, bf16 or fp32"),
    ("export tiny", "tiny is not a run of qc", "compile it first: qc compile fp16 --set model=tiny"),
    ("show nowhere", "there is no recipe 'nowhere'",
     "give a path, or one of awareness, awareness-degrade, awareness-fp8, awareness-int8, fp16, kd-cache, lut-layerwise, lut-q4-to-q2, lut-v1-to-v2, lut-v2-scratch, qlora, quickstart, ternary, ternary-handoff, ternary-quality, ternary-speed"),
    ("show tiny", "tiny is neither an artifact nor a run nor a recipe",
     "give a folder that qc compile wrote, or a recipe"),
    ("show recipe.yaml --stage tun", "recipe.yaml has no stage 'tun'", "its stages are tune, merge"),
    ("generate", "there is no prompt", 'give --prompt "def main(" or --interactive'),
    ("generate -p x --artifact tiny", "tiny is neither an artifact nor a run",
     "give a folder that qc compile, qc train or qc run wrote"),
    ("eval nowhere", "nowhere is neither an artifact nor a run",
     "give a folder that qc compile, qc train or qc run wrote"),
    ("verify nowhere", "there is no folder nowhere", "give the folder that qc export wrote"),
    ("verify tiny", "tiny is no export of qc: it has no qc-export.json", "give the folder that qc export wrote"),
    ("compile nowhere.yaml", "there is no recipe 'nowhere.yaml'", "did you mean 'recipe.yaml'?"),
    ("compile tiny", "tiny is a folder, not a recipe", "name a YAML file"),
    ("compile recipe.yaml --runs taken", "writing taken/recipe/KEY failed: Not a directory",
     "check the path and the disk"),
    ("recipes copy qlra", "no recipe is called 'qlra'", "did you mean 'qlora'?"),
    ("recipes copy qlora --to nowhere/x", "cannot write nowhere/x: No such file or directory",
     "give a file in a folder that you may write to"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "what", "fix"), SILLY, ids=[call for call, _, _ in SILLY])
def test_a_silly_call_ends_with_1_and_a_fix_and_no_traceback(
    call: str, what: str, fix: str, folder: Path, tmp_path: Path
) -> None:
    for name in ("tiny", "recipe.yaml", "corpus"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "taken").touch()
    done = qc(*call.split(), cwd=tmp_path)
    said = done.err if "KEY" not in what else done.err.replace(_key(done.err), "KEY")
    assert (done.code, done.out, said) == (1, "", f"error: {what}\n  fix    {fix}\n")


def _key(text: str) -> str:
    """The 12 digits of the run's folder."""
    return text.partition("/recipe/")[2][:12]
