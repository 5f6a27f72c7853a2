"""Load a recipe and say what is wrong with it."""

from __future__ import annotations

import textwrap
from pathlib import Path

from graph.errors import QcError, QcErrors
from recipes.load import load
from recipes.override import Overrides
from recipes.schema import Recipe

TRAIN = """
train:
  data: python-stdlib
  steps: 100
  lr: 1e-3
"""


def write(name: str, text: str) -> Path:
    """A file in the current folder."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text).lstrip("\n"), encoding="utf-8")
    return path


def read(text: str, set: Overrides = ()) -> Recipe:
    """The recipe of a text."""
    return load(write("recipe.yaml", text), set)


def mistakes(recipe: str | Path, set: Overrides = ()) -> list[str]:
    """``place | what | fix`` of every mistake; none if the recipe loads."""
    try:
        load(recipe, set)
    except QcErrors as errors:
        return [f"{error.line} | {error.what} | {error.fix}" for error in errors.errors]
    except QcError as error:
        return [f"{error.line} | {error.what} | {error.fix}"]
    return []


def complaints(text: str, set: Overrides = ()) -> list[str]:
    """The same for a text."""
    return mistakes(write("recipe.yaml", text), set)
