"""A recipe as plain values with every default written out, and its hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML

if TYPE_CHECKING:
    from recipes.schema import PassStep, Recipe

PATH_KEYS = ("model", "text", "jsonl", "hf", "cache")
"""Keys whose values may be files: absolute once read, relative to the recipe once written."""


WORK = ("passes", "audit", "assess", "train", "evaluate", "require", "export")
"""What a recipe has that its stages have instead, if there are any."""


def explicit(recipe: Recipe) -> dict[str, Any]:
    """Every key of ``recipe`` with its value, in the words of a recipe."""
    folder = recipe.file.parent
    hidden = ["file", *(["stages"] if not recipe.stages else list(WORK))]
    return _fields(recipe, folder, hidden)


def digest(recipe: Recipe) -> str:
    """The sha256 of ``explicit``, the recipe's name left out."""
    content = explicit(recipe)
    del content["name"]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def text(recipe: Recipe) -> str:
    """``explicit`` as YAML: the content of recipe.lock.yaml."""
    yaml, stream = YAML(typ="safe", pure=True), StringIO()
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(explicit(recipe), stream)
    return stream.getvalue()


def _fields(item: Any, folder: Path, hidden: list[str] | tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields of a dataclass; one that is None is left out where that is its default."""
    shown = (one for one in fields(item) if one.name not in hidden)
    found = {one.name: (one, getattr(item, one.name)) for one in shown}
    return {
        key: _plain("model" if one.metadata.get("path") else key, value, folder)
        for key, (one, value) in found.items()
        if value is not None or _told(one)
    }


def _told(one: Field[Any]) -> bool:
    return one.default is not None and one.default is not MISSING


def _plain(key: str, value: Any, folder: Path) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(key, item, folder) for item in value]
    if isinstance(value, Mapping):
        return {name: _plain(name, item, folder) for name, item in value.items()}
    if hasattr(value, "options_lines"):
        return _step(value, folder)
    if is_dataclass(value):
        return _fields(value, folder)
    return _portable(value, folder) if key in PATH_KEYS and isinstance(value, str) else value


def _step(step: PassStep, folder: Path) -> dict[str, Any]:
    on = {"on": step.on} if step.on is not None else {}
    return {step.kind: _fields(step.step, folder), "name": step.name, **on}


def _portable(value: str, folder: Path) -> str:
    """A path inside or beside the recipe's folder relative to it; any other as it is."""
    path = Path(value)
    if not path.is_absolute():
        return value
    if path.is_relative_to(folder):
        return f"./{path.relative_to(folder).as_posix()}"
    return f"../{path.relative_to(folder.parent).as_posix()}" if path.is_relative_to(folder.parent) else value
