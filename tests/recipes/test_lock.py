from pathlib import Path

import pytest
from ruamel.yaml import YAML

from recipes.load import load
from recipes.lock import text as lock_text
from tests.recipes.reading import TRAIN, read, write

pytestmark = pytest.mark.usefixtures("folder")

RECIPE = f"""
model: ./qwen3-tiny
passes:
  - squeeze: {{select: {{role: [attn.*]}}, scale: 1e-4}}
  - adapt: {{rank: 4, start: corpus/a.txt}}
    name: "on"
{TRAIN}  clip: null
  objective: kd
  eval_data: {{text: corpus/*.txt}}
evaluate: {{metrics: [kl]}}
require: [{{metric: kl, op: "<", value: 1}}]
export: [{{target: safetensors}}]
"""


def test_a_lock_is_a_recipe_that_does_the_same() -> None:
    recipe = read(RECIPE)
    write("recipe.lock.yaml", lock_text(recipe))
    again = load("recipe.lock.yaml")
    assert again == recipe
    assert again.digest() == recipe.digest()
    assert again.resolved() == recipe.resolved() == YAML(typ="safe", pure=True).load(lock_text(recipe))


def test_every_default_is_written_out_and_paths_are_those_of_the_recipe() -> None:
    resolved = read(RECIPE).resolved()
    assert resolved["model"] == "./qwen3-tiny"
    assert resolved["train"]["eval_data"] == {"text": "./corpus/*.txt"}
    assert resolved["train"]["objective"] == {"name": "kd", "temperature": 1.0, "alpha": 1.0}
    assert resolved["train"]["clip"] is None
    assert resolved["passes"][1] == {
        "adapt": {"select": {"allow_empty": False}, "rank": 4, "start": "./corpus/a.txt"},
        "name": "on",
    }
    assert resolved["probe"] == {"batch": 2, "length": 16}


def test_the_digest_is_of_what_is_done_not_of_how_it_is_written() -> None:
    recipe = read(RECIPE)
    other = read(f"# a comment\n{RECIPE}\nseed: 0\nname: other\n")
    assert other.digest() == recipe.digest()
    assert read(RECIPE, ["seed=1"]).digest() != recipe.digest()
    assert read(RECIPE, ["squeeze.bits=5"]).digest() != recipe.digest()


def test_the_digest_does_not_know_where_the_recipe_lies(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = read(RECIPE)
    (folder / "moved").mkdir()
    for name in ("qwen3-tiny", "corpus", "recipe.yaml"):
        (folder / name).rename(folder / "moved" / name)
    monkeypatch.chdir(folder / "moved")
    assert load("recipe.yaml").digest() == recipe.digest()


def test_a_lock_of_stages() -> None:
    recipe = read("model: seedling\nstages: [{name: a, passes: [squeeze]}, {name: b, export: [{target: safetensors}]}]")
    assert "passes" not in recipe.resolved()
    write("lock.yaml", lock_text(recipe))
    assert load("lock.yaml").stages == recipe.stages
