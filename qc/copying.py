"""Copying a shipped recipe."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from graph.errors import QcError
from recipes.shipped import names, path


def copy(name: str, to: Path | None) -> Path:
    """Write the shipped recipe ``name`` to ``to``; nothing is overwritten."""
    if name not in names():
        near = get_close_matches(name, names(), n=1)
        fix = f"did you mean {near[0]!r}?" if near else f"the shipped recipes are {', '.join(names())}"
        raise QcError(f"no recipe is called {name!r}", fix=fix)
    target = to or Path(f"{name}.yaml")
    if target.exists():
        raise QcError(f"{target} is already there", fix="give another file with --to")
    try:
        target.write_text(path(name).read_text(encoding="utf-8"), encoding="utf-8")
    except OSError as error:
        raise QcError(
            f"cannot write {target}: {error.strerror}", fix="give a file in a folder that you may write to"
        ) from None
    return target
