"""Read a recipe, strictly: every mistake at its place, all of them at once."""

from __future__ import annotations

from pathlib import Path

from graph.errors import QcError, raise_all
from recipes import files, override, paths, shorthand
from recipes.build import build
from recipes.compose import compose
from recipes.document import Node, Unreadable
from recipes.mistakes import Mistakes
from recipes.override import Overrides
from recipes.schema import Recipe


def load(recipe: str | Path, set: Overrides = ()) -> Recipe:
    """The recipe of a file, or the shipped one of that name; ``set`` overrides values, as ``--set`` does.

    Raises QcError, or QcErrors with all mistakes there are.
    """
    found, errors = draft(recipe, set)
    raise_all(errors)
    assert found is not None, "unreadable for no reason"
    return found


def draft(recipe: str | Path, set: Overrides = ()) -> tuple[Recipe | None, list[QcError]]:
    """As much of a recipe as can be read, and its mistakes; of its passes those ahead of the first mistaken one."""
    mistakes = Mistakes()
    path, shown = files.find(str(recipe), Path())
    try:
        root = compose(path, shown, mistakes)
    except Unreadable:
        return None, mistakes.errors()
    _complete(root, set, mistakes)
    found = build(root, Path(path).absolute(), mistakes)
    return found, mistakes.errors()


def _complete(root: Node, set: Overrides, mistakes: Mistakes) -> None:
    """Put in the overrides; write out what is short, before and after, and make paths absolute."""
    shorthand.write_out(root, mistakes)
    override.apply(set, root, mistakes)
    shorthand.write_out(root, mistakes)
    paths.resolve(root, mistakes)
