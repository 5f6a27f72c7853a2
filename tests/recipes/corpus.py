"""The broken recipes of ``broken/*.txt``: a name, the recipe, and every mistake with line, column, text and fix."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "broken"


@dataclass(frozen=True)
class Broken:
    """A recipe, and what is to be said of it."""

    theme: str
    """The file it is in."""

    name: str
    text: str
    said: tuple[str, ...]
    """``line:column | what | fix`` of each mistake, in order."""


def broken() -> list[Broken]:
    """All of them."""
    return [_case(file.stem, block) for file in sorted(FOLDER.glob("*.txt")) for block in _blocks(file)]


def _blocks(file: Path) -> list[str]:
    return f"\n{file.read_text(encoding='utf-8')}".split("\n--- ")[1:]


def _case(theme: str, block: str) -> Broken:
    name, *lines = block.splitlines()
    text = "".join(f"{line}\n" for line in lines if not line.startswith("=> "))
    return Broken(theme, name, text, tuple(line.removeprefix("=> ") for line in lines if line.startswith("=> ")))
