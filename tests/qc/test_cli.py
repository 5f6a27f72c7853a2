"""The commands that work on a recipe or a run, and what they say with ``--json``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.qc.command import answer, qc
from tests.qc.conftest import RECIPE

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
def compiled(folder: Path) -> Mapping[str, str]:
    """What ``qc compile --json`` says of the recipe."""
    return answer(qc("compile", "recipe.yaml", "--json", cwd=folder))


def test_a_gate_that_fails_ends_with_3_and_leaves_the_figures(folder: Path) -> None:
    (folder / "gated.yaml").write_text(GATED)
    done = qc("run", "gated.yaml", "--json", cwd=folder)
    assert done.code == 3, done.err
    (error,) = json.loads(done.out)["errors"]
    assert error["what"].startswith("perplexity < 1 fails: it is ")
    assert "\nstart " in done.err, "the table of what was measured so far"
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


BOTH = """\
model: tiny
passes:
  - quantize-base: {scheme: nf4, block: 4096}
  - add-lora: {rank: 4, select: {role: [atn.*]}}
  - merge-lora: {into: full}
train: {data: {text: corpus/*.txt}, steps: 1, lr: 1.0e-3, stepz: 2}
"""


def test_mistakes_of_the_text_and_of_shapes_come_together_and_what_many_sites_share_once(folder: Path) -> None:
    (folder / "both.yaml").write_text(BOTH)
    errors = json.loads(qc("check", "both.yaml", "--json", cwd=folder).out)["errors"]
    assert [e["line"] for e in errors] == ["both.yaml:3:34"] * 14 + ["both.yaml:4:41", "both.yaml:6:59"]
    assert errors[-2]["fix"] == "did you mean 'attn.*'?"
    told = qc("check", "both.yaml", cwd=folder).err
    assert told.count("error: ") == 4
    first = "block 4096 does not divide the 64 input columns of model.layers.0.self_attn.q_proj.weight"
    assert f"{first}, and the same at 11 more, the last of them model.layers.1.mlp.up_proj\n" in told


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

    again = answer(qc("export", compiled["run"], "--force", "--json", cwd=folder))
    assert again["folder"] == exported["folder"]
    assert again["top1"] == 1.0
    (folder / "mine").mkdir()
    (folder / "mine/notes.txt").write_text("kept")
    refused = qc("export", compiled["run"], "--force", "--out", "mine", cwd=folder)
    assert "error: mine is no export of qc, and --force replaces nothing else\n" in refused.err
    assert (folder / "mine/notes.txt").read_text() == "kept"


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
