"""``qc cache teacher``, and trainings that read what it wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.qc.command import answer, qc

CACHE = "cache: {data: {text: corpus/*.txt}, sequences: 12, heldout: 2, length: 16, topk: 4, negatives: 2, shard: 5}\n"
MAKER = f"model: tiny\n{CACHE}"
STUDENT = """
model: tiny
passes:
  - quantize-base: {scheme: nf4}
  - add-lora: {rank: 2, alpha: 4}
train:
  objective: {kd-cache: {cache: maker.yaml, hard_top1: 0.1}}
  steps: 2
  batch: 2
  lr: 1.0e-3
  plot: false
"""


@pytest.fixture(scope="module")
def home(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of its own, with a recipe that makes a cache and one that trains on it."""
    home = tmp_path_factory.mktemp("home")
    for name in ("tiny", "corpus"):
        shutil.copytree(folder / name, home / name)
    (home / "maker.yaml").write_text(MAKER)
    (home / "student.yaml").write_text(STUDENT)
    (home / "bare.yaml").write_text("model: tiny\n")
    (home / "both.yaml").write_text(STUDENT.replace("cache: maker.yaml, ", "").replace("model: tiny\n", MAKER))
    return home


@pytest.fixture(scope="module")
def made(home: Path) -> dict[str, object]:
    """What the command says of the first run."""
    found: dict[str, object] = answer(qc("cache", "teacher", "maker.yaml", "--json", cwd=home))
    return found


def test_it_says_what_it_wrote_and_the_size_is_as_predicted(home: Path, made: dict[str, object]) -> None:
    folder = home / str(made["folder"])
    assert made.keys() == {
        "folder", "sequences", "heldout", "shards", "written", "bytes", "file_bytes", "bytes_per_token", "tokens",
        "tokens_per_second", "notes",
    }  # fmt: skip
    assert (made["sequences"], made["heldout"], made["shards"], made["written"]) == (12, 2, 4, 4)
    assert made["bytes"] == 14 * (12 * 16 + 15 * (6 * 6 + 4))
    assert made["file_bytes"] == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert made["folder"] == f"runs/.cache/teacher/maker-{folder.name[-12:]}"
    meta = json.loads((folder / "meta.json").read_text())
    assert (meta["model"], meta["length"], meta["topk"], meta["vocabulary"]) == ("tiny", 16, 4, 259)
    assert str(home) not in (folder / "meta.json").read_text()


def test_a_second_call_finds_it_whole_and_force_makes_it_anew(home: Path, made: dict[str, object]) -> None:
    again = qc("cache", "teacher", "maker.yaml", cwd=home)
    assert (again.code, again.out) == (0, f"{made['folder']}\n")
    assert "4 shards are there already" in again.err
    assert "nothing left to do" in again.err
    folder = home / str(made["folder"])
    before = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    forced = answer(qc("cache", "teacher", "maker.yaml", "--force", "--json", cwd=home))
    assert (forced["folder"], forced["written"]) == (made["folder"], 4)
    assert {path.name: path.read_bytes() for path in folder.glob("*.safetensors")} == before


def test_a_setting_gives_another_folder_and_out_names_one(home: Path, made: dict[str, object]) -> None:
    other = answer(qc("cache", "teacher", "maker.yaml", "--set", "cache.topk=3", "--json", cwd=home))
    assert other["folder"] != made["folder"]
    named = answer(qc("cache", "teacher", "maker.yaml", "--set", "cache.out=here/cache", "--json", cwd=home))
    assert named["folder"] == "here/cache"
    done = qc("cache", "teacher", "maker.yaml", "--set", "cache.out=here/cache", "--set", "cache.topk=3", cwd=home)
    assert done.code == 1
    assert done.err.endswith(
        "error: here/cache holds another cache: its topk is 4, not 3\n"
        "  fix    write to another folder (cache.out), or make it anew with --force\n"
    )


def test_a_training_makes_the_cache_of_the_recipe_it_names_or_takes_it_as_it_is(
    home: Path, made: dict[str, object]
) -> None:
    assert qc("compile", "student.yaml", cwd=home).code == 0
    done = qc("train", "--json", cwd=home)
    run = Path(answer(done)["run"])
    assert "nothing left to do" in done.err
    rows = [json.loads(line) for line in (home / run / "train/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["loss"] == pytest.approx(row["loss/kl"] + 0.1 * row["loss/hard_top1"]) for row in rows)
    assert rows[-1]["eval_loss"] > 0


def test_a_run_makes_its_own_cache_first(home: Path) -> None:
    done = qc("run", "both.yaml", "--json", "--set", "evaluate={batches: 1, length: 16}", cwd=home)
    steps = [one["step"] for one in answer(done)["steps"]]
    assert "trained" in steps
    assert done.err.index("bytes a token") < done.err.index("compiled before")


def test_a_recipe_without_the_section_is_told_what_to_add(home: Path) -> None:
    done = qc("cache", "teacher", "bare.yaml", cwd=home)
    assert (done.code, done.err) == (
        1,
        "error: bare.yaml makes no cache\n"
        f"  recipe {home / 'bare.yaml'}\n"
        "  fix    add cache: {data: python-stdlib, sequences: 2048}; qc recipes copy kd-cache gives an example\n",
    )


def test_mistakes_of_the_recipe_come_as_json(home: Path) -> None:
    done = qc("cache", "teacher", "maker.yaml", "--set", "cache.topk=300", "--json", cwd=home)
    assert done.code == 1
    (error,) = json.loads(done.out)["errors"]
    assert (error["what"], error["fix"]) == (
        "topk 300 and negatives 2 are more than the 259 tokens of the teacher", "set topk to at most 257"
    )  # fmt: skip


def test_help_says_what_it_is_for(home: Path) -> None:
    done = qc("cache", "teacher", "--help", cwd=home)
    assert done.code == 0
    assert "students that train with the" in done.out
    assert "--force" in done.out
