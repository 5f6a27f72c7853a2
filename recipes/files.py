"""Find and read the files of recipes."""

from __future__ import annotations

import os
from pathlib import Path

from graph.errors import QcError
from recipes import shipped
from recipes.mistakes import nearest

LARGEST = 1_000_000
"""Bytes; a recipe is a page of text."""


def find(name: str, folder: Path) -> tuple[Path, str]:
    """The file that ``name`` means, from ``folder`` or among the shipped recipes, and what to call it."""
    path = folder / os.path.expanduser(name)
    if _is_there(path) or name not in shipped.names():
        return path, os.path.normpath(path)
    return shipped.path(name), f"recipes/{name}.yaml"


def read(path: Path, name: str) -> str:
    """The text of a recipe; a QcError says what else the file is."""
    try:
        if not path.exists():
            raise QcError(f"there is no recipe {name!r}", fix=_near(path, name))
        if not path.is_file():
            kind = "a folder" if path.is_dir() else "not a regular file"
            raise QcError(f"{name} is {kind}, not a recipe", fix=_inside(path))
        if path.stat().st_size > LARGEST:
            raise QcError(f"{name} is larger than {LARGEST} bytes", fix="a recipe is a page of YAML; give its path")
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise QcError(f"{name} cannot be read: {why.lower()}", fix="check the path and its permissions") from None
    return _decode(content, name)


def _decode(content: bytes, name: str) -> str:
    if b"\0" in content:
        place = _place(content[: content.index(b"\0")])
        raise QcError(f"{name} is not text", fix="a recipe is a YAML file", line=f"{name}:{place}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what, place = f"byte 0x{content[error.start]:02x} is not UTF-8", _place(content[: error.start])
        raise QcError(what, fix="save the file as UTF-8", line=f"{name}:{place}") from None


def _place(before: bytes) -> str:
    """The line and column after ``before``."""
    text = before.decode("utf-8", "replace")
    line, column = text.count("\n") + 1, len(text) - text.rfind("\n")
    return f"{line}:{column}"


def _is_there(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _near(path: Path, name: str) -> str:
    beside = [file.name for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    near = nearest(path.name, beside)
    if near:
        return f"did you mean {os.path.join(os.path.dirname(name), near)!r}?"
    near = nearest(path.stem, shipped.names())
    return f"did you mean {near!r}?" if near else f"give a path, or one of {', '.join(shipped.names())}"


def _inside(path: Path) -> str:
    recipes = sorted(file.name for file in path.glob("*.y*ml"))[:3] if path.is_dir() else []
    return f"name a file in it: {', '.join(recipes)}" if recipes else "name a YAML file"
