"""What is wrong with a recipe: collected on the way, told all at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from graph.errors import QcError


@dataclass(frozen=True)
class Place:
    """Where something is written: in a file, or (line 0) on the command line."""

    file: str
    """The file as the user knows it, or ``--set train.steps=1``."""

    line: int = 0
    """From 1."""

    column: int = 0
    """From 1, in characters."""

    folder: Path = field(default=Path(), compare=False)
    """Where relative paths written here start."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


class Mistakes:
    """The mistakes found so far."""

    def __init__(self) -> None:
        self._found: dict[tuple[Place, str], QcError] = {}
        self.partial = False
        """Whether a file could not be read: what is not there may be in it."""

    def add(self, place: Place, what: str, fix: str) -> None:
        """One more; a mistake that is already known is not told twice."""
        self._found.setdefault((place, what), QcError(what, fix=fix, line=str(place)))

    def lack(self, place: Place, what: str, fix: str) -> None:
        """Something is not there; told if all files were read."""
        if not self.partial:
            self.add(place, what, fix)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._found)

    def errors(self) -> list[QcError]:
        """They in reading order: file by file in the order of their first mistake, what was ``--set`` last."""
        files = list(dict.fromkeys(place.file for place, _ in self._found))
        order = sorted(self._found, key=lambda at: (not at[0].line, files.index(at[0].file), at[0].line, at[0].column))
        return [self._found[at] for at in order]


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that ``name`` most likely means; case and ``-`` or ``_`` do not count."""
    plain = {_plain(one): one for one in known}
    near = get_close_matches(_plain(name), plain, n=1)
    return plain[near[0]] if near else None


def suggest(name: str, known: Iterable[str], otherwise: str) -> str:
    """``did you mean 'x'?``, or ``otherwise`` and all that is known."""
    offered = list(known)
    near = nearest(name, offered)
    return f"did you mean {near!r}?" if near else f"{otherwise} {', '.join(offered) or 'none'}"


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
