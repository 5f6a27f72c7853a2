"""The recipes and the model that come with qc. Only the standard library: ``qc recipes`` answers at once."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The shipped recipes."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def path(name: str) -> Path:
    """The file of a shipped recipe."""
    return FOLDER / f"{name}.yaml"


def seedling() -> Path:
    """The folder of the model that recipes call ``seedling``."""
    return FOLDER / "seedling"


def schema() -> str:
    """The JSON Schema of recipes, as text."""
    return (FOLDER / "schema.json").read_text(encoding="utf-8")


def shipped() -> list[tuple[str, str]]:
    """Each recipe's name, and the first comment of its file."""
    return [(name, _first_comment(path(name))) for name in names()]


def _first_comment(file: Path) -> str:
    lines = file.read_text(encoding="utf-8").splitlines()
    told = [line.lstrip("# ").rstrip() for line in lines if line.startswith("#") and "yaml-language-server" not in line]
    return told[0] if told else ""
