"""The command line: what it answers, how it ends, and what it never does."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.docs.blocks import ROOT
from tests.qc.command import Done, python, qc

TINY = """
from transformers import Qwen3Config, Qwen3ForCausalLM
from tests.runtimes.data.byte_tokenizer import byte_tokenizer
import torch
torch.manual_seed(0)
tokenizer = byte_tokenizer()
config = Qwen3Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    intermediate_size=128, vocab_size=len(tokenizer), tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id)
Qwen3ForCausalLM(config).save_pretrained("tiny")
tokenizer.save_pretrained("tiny")
"""

RECIPE = """
model: tiny
stages:
  - name: tune
    passes:
      - quantize-base: {scheme: nf4}
      - add-lora: {rank: 2, alpha: 4}
        name: lora
    train: {data: {text: corpus/*.txt}, steps: 2, batch: 2, length: 16, lr: 1.0e-3, plot: false}
  - name: merge
    passes:
      - merge-lora: {into: dequantized}
    export:
      - {target: safetensors, dtype: fp16}
"""

SHAPES = """
model: tiny
passes:
  - add-lora: {rank: 65, select: {role: attn.q}}
  - snap: {select: {name: "*.qproj.*"}}
"""

GATED = """
model: tiny
evaluate: {data: {text: corpus/*.txt}, batches: 1, length: 16}
require:
  - {metric: perplexity, op: <, value: 1}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Qwen3, a corpus and recipes."""
    folder = tmp_path_factory.mktemp("project")
    done = python(TINY, cwd=folder, path=[ROOT])
    assert done.code == 0, done.both
    (folder / "corpus").mkdir()
    for number in range(4):
        (folder / f"corpus/{number}.txt").write_text(f"text number {number}, and nothing else\n" * 20)
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "gated.yaml").write_text(GATED)
    return folder


@pytest.fixture(scope="module")
def compiled(folder: Path) -> Mapping[str, str]:
    """What ``qc compile --json`` says of the recipe."""
    return answer(qc("compile", "recipe.yaml", "--json", cwd=folder))


def answer(done: Done) -> Any:
    """The JSON on stdout of a command that did what it should; nothing else may stand there."""
    assert done.code == 0, done.err
    return json.loads(done.out)


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


def test_the_shipped_recipes_are_listed(tmp_path: Path) -> None:
    names = {"fp16", "qlora", "quickstart"}
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
    ("export --target onyx", "no export target is called 'onyx'", "use one of: safetensors"),
    ("export --dtype fp8", "'fp8' is no dtype to export", "use fp16, bf16 or fp32"),
    ("export tiny", "tiny is not a run of qc", "give a folder under runs/, or leave it out for the latest run"),
    ("show nowhere", "there is no recipe 'nowhere'", "give a path, or one of fp16, qlora, quickstart"),
    ("show tiny", "tiny is neither an artifact nor a run nor a recipe",
     "give a folder that qc compile wrote, or a recipe"),
    ("show recipe.yaml --stage tun", "recipe.yaml has no stage 'tun'", "its stages are tune, merge"),
    ("generate", "there is no prompt", 'give --prompt "def main(" or --interactive'),
    ("generate -p x --artifact tiny", "tiny is neither an artifact nor a run",
     "give a folder that qc compile, qc train or qc run wrote"),
    ("eval nowhere", "nowhere is neither an artifact nor a run",
     "give a folder that qc compile, qc train or qc run wrote"),
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


def test_a_gate_that_fails_ends_with_3_and_leaves_the_figures(folder: Path) -> None:
    done = qc("run", "gated.yaml", "--json", cwd=folder)
    assert done.code == 3
    assert "perplexity < 1 fails: it is " in done.out
    (run,) = (folder / "runs/gated").iterdir()
    assert json.loads((run / "measured.json").read_text())[0]["step"] == "start"


# -- check ----------------------------------------------------------------------------------------------------------


def test_check_needs_no_weights(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    shutil.copy(folder / "tiny/config.json", tmp_path / "tiny/config.json")
    shutil.copytree(folder / "corpus", tmp_path / "corpus")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    found = answer(qc("check", "recipe.yaml", "--json", cwd=tmp_path))
    assert found.keys() == {"ok", "sites", "tensors", "blocks", "bytes"}
    assert (found["ok"], found["blocks"]) == (True, 2)
    weights = 259 * 64 + 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128 + 2 * 64 + 2 * 16) + 64
    assert weights * 4 <= found["bytes"] < weights * 4 + 100, "the weights in fp32, and the frequencies of RoPE"
    done = qc("compile", "recipe.yaml", cwd=tmp_path)
    assert done.code == 1
    assert "tiny has no *.safetensors" in done.err, "the test has a folder without weights"


def test_check_finds_what_only_the_shapes_of_the_model_show_with_line_and_column(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    shutil.copy(folder / "tiny/config.json", tmp_path / "tiny/config.json")
    (tmp_path / "recipe.yaml").write_text(SHAPES)
    done = qc("check", "recipe.yaml", "--json", cwd=tmp_path)
    assert done.code == 1
    errors = json.loads(done.out)["errors"]
    assert [(e["line"], e["site"], e["what"]) for e in errors] == [
        ("recipe.yaml:4:16", "model.layers.0.self_attn.q_proj", "rank 65 is more than a weight of 64 x 64 can have"),
        ("recipe.yaml:4:16", "model.layers.1.self_attn.q_proj", "rank 65 is more than a weight of 64 x 64 can have"),
        ("recipe.yaml:5:12", None, "select {name: *.qproj.*} matches no float tensor"),
    ]
    assert errors[0]["fix"] == "set rank to at most 64"
    assert errors[2]["fix"].startswith("the nearest names are model.layers.")


def test_all_mistakes_of_a_recipe_come_at_once_as_text_and_as_json(folder: Path) -> None:
    (folder / "broken.yaml").write_text("model: tiny\npases: []\npasses:\n  - add-lora: {rnak: 4}\n")
    done = qc("check", "broken.yaml", cwd=folder)
    assert (done.code, done.out) == (1, "")
    assert done.err.count("error: ") == 2
    found = qc("check", "broken.yaml", "--json", cwd=folder)
    assert (found.code, found.err) == (1, "")
    errors = json.loads(found.out)["errors"]
    assert [(e["line"], e["fix"]) for e in errors] == [
        ("broken.yaml:2:1", "did you mean 'passes'?"),
        ("broken.yaml:4:16", "did you mean 'rank'?"),
    ]
    assert all(e.keys() == {"what", "site", "line", "fix"} for e in errors)


# -- a run ----------------------------------------------------------------------------------------------------------


def test_compile_says_where_run_and_artifact_are(compiled: Mapping[str, str], folder: Path) -> None:
    assert compiled.keys() == {"run", "artifact"}
    assert (folder / compiled["artifact"] / "manifest.json").is_file()
    assert compiled["artifact"] == f"{compiled['run']}/tune/compiled"


def test_a_second_compile_is_taken_from_the_first(compiled: Mapping[str, str], folder: Path) -> None:
    manifest = folder / compiled["artifact"] / "manifest.json"
    before = manifest.stat().st_mtime_ns
    again = qc("compile", "recipe.yaml", cwd=folder)
    assert again.out == f"{compiled['artifact']}\n"
    assert f"tune: compiled before: {compiled['artifact']}" in again.err
    assert manifest.stat().st_mtime_ns == before


def test_another_recipe_with_the_same_passes_takes_the_same_work(compiled: Mapping[str, str], folder: Path) -> None:
    (folder / "other.yaml").write_text(RECIPE.replace("steps: 2", "steps: 3"))
    done = qc("compile", "other.yaml", "--json", cwd=folder)
    assert answer(done)["run"] != compiled["run"]
    assert "tune: compiled before: " in done.err
    files = [
        folder / answer(done)["artifact"] / "weights.safetensors",
        folder / compiled["artifact"] / "weights.safetensors",
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_show_gives_sites_with_role_shape_format_and_bytes(compiled: Mapping[str, str], folder: Path) -> None:
    found = answer(qc("show", compiled["artifact"], "--json", cwd=folder))
    assert found.keys() == {"sites", "bytes", "graph"}
    (up,) = [s for s in found["sites"] if s["site"] == "model.layers.0.mlp.up_proj"]
    values, scales = 128 * 64 // 2, 128 * 64 // 64 * 4
    assert (up["role"], up["shape"], up["format"], up["bytes"]) == ("mlp.up", "[128, 64]", "nf4", values + scales)
    planned = answer(qc("show", "recipe.yaml", "--stage", "tune", "--json", cwd=folder))
    assert planned["sites"] == found["sites"], "a recipe plans what its artifact then is"
    assert planned["graph"] == found["graph"]


def test_a_training_an_export_and_its_check_say_json_and_nothing_else(
    compiled: Mapping[str, str], folder: Path
) -> None:
    trained = answer(qc("train", compiled["run"], "--json", cwd=folder))
    assert trained == {"run": compiled["run"], "artifact": f"{compiled['run']}/tune/trained"}

    differing = answer(qc("diff", compiled["artifact"], trained["artifact"], "--json", cwd=folder))
    assert differing.keys() == {"text", "tensors"}
    assert differing["text"] == ""
    assert len(differing["tensors"]) == 28
    assert all("lora_" in line and line.endswith(": other values") for line in differing["tensors"])

    exported = answer(qc("export", compiled["run"], "--no-verify", "--json", cwd=folder))
    assert exported.keys() == {"folder", "bytes", "seconds"}

    weights = folder / exported["folder"] / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    spoiled = qc("verify", exported["folder"], "--json", cwd=folder)
    assert spoiled.code == 4
    assert json.loads(spoiled.out)["errors"][0]["fix"] == "export it again"


def test_generate_says_text_and_speed(compiled: Mapping[str, str], folder: Path) -> None:
    said = answer(qc("generate", "-p", "ab", "--max-tokens", "3", "--artifact", compiled["run"], "--json", cwd=folder))
    assert said.keys() == {"prompt", "text", "tokens", "finish", "tokens_per_second", "uncached"}
    assert (said["prompt"], said["tokens"]) == ("ab", 3)


def test_interactive_asks_until_an_empty_line(compiled: Mapping[str, str], folder: Path) -> None:
    done = qc("generate", "-i", "--max-tokens", "2", "--artifact", compiled["run"], cwd=folder, stdin="a\nb\n\nc\n")
    assert done.code == 0
    assert done.out.count("> ") == 3


def test_eval_says_its_figures(compiled: Mapping[str, str], folder: Path) -> None:
    found = answer(
        qc("eval", compiled["run"], "--data", "corpus/*.txt", "--batches", "1", "--length", "16", "--json", cwd=folder)
    )
    assert found.keys() == {"tokens", "loss", "perplexity", "kl", "top1", "bits_per_weight", "bytes"}
    assert found["perplexity"] > 1
    assert 0 <= found["kl"] < 1


def test_a_recipe_that_has_changed_since_is_not_trained(compiled: Mapping[str, str], folder: Path) -> None:
    (folder / "recipe.yaml").write_text(RECIPE.replace("rank: 2", "rank: 3"))
    done = qc("train", compiled["run"], cwd=folder)
    (folder / "recipe.yaml").write_text(RECIPE)
    where = folder / "recipe.yaml"
    assert done.code == 1
    assert (
        done.err
        == f"error: {where} has changed since {compiled['run']} was compiled\n  fix    run qc compile {where} again\n"
    )
