"""Recipes of several models: which pass is about which, and what becomes one graph."""

from __future__ import annotations

from pathlib import Path

import pytest

from graph.errors import QcError
from recipes.load import load

MODELS = "models: {encoder: {model: seedling, kind: encoder}, decoder: {model: seedling}}\n"


def mistakes(folder: Path, passes: str) -> str:
    file = folder / "recipe.yaml"
    file.write_text(MODELS + passes)
    with pytest.raises(QcError) as caught:
        load(file)
    return str(caught.value).replace(f"{folder}/", "")


def test_a_pass_says_which_model_until_they_are_joined(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        MODELS + "passes:\n  - {insert-gca: {}, on: decoder}\n  - attach-memory: {}\n  - hoist-memory-kv: {}\n"
    )
    recipe = load(file)
    assert [step.on for step in recipe.passes] == ["decoder", None, None]
    assert recipe.models is not None
    assert recipe.models["encoder"].kind == "encoder"


@pytest.mark.parametrize(
    ("passes", "said"),
    [
        (
            "passes:\n  - insert-gca: {}\n",
            "insert-gca does not say which model it rewrites\n  recipe recipe.yaml:3:5\n  fix    add on: encoder",
        ),
        (
            "passes:\n  - attach-memory: {}\n    on: decoder\n",
            "on: decoder, but attach-memory joins models\n  recipe recipe.yaml:4:5\n  fix    take on: out",
        ),
        (
            "passes:\n  - attach-memory: {}\n  - hoist-memory-kv: {}\n    on: decoder\n",
            "on: decoder, but the models are one graph by now\n  recipe recipe.yaml:5:5\n"
            "  fix    take on: out, and select {name: 'decoder.*'} where it matters",
        ),
    ],
)
def test_what_is_said_of_models_must_make_sense(tmp_path: Path, passes: str, said: str) -> None:
    assert mistakes(tmp_path, passes) == said


def test_what_is_joined_in_one_stage_is_joined_in_the_next(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        MODELS
        + "stages:\n  - name: one\n    passes:\n      - {insert-gca: {}, on: decoder}\n      - attach-memory: {}\n"
        + "  - name: two\n    passes:\n      - hoist-memory-kv: {}\n"
    )
    assert [step.kind for step in load(file).stages[1].passes] == ["hoist-memory-kv"]
