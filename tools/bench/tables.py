"""The tables of docs/quality.md, which commands of ``tools`` print and put there."""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "quality.md"
END = "<!-- end -->"


def replace_table(name: str, text: str) -> None:
    """Put ``text`` between the marks of that name."""
    begin = f"<!-- table: {name} -->"
    head, found, rest = PAGE.read_text().partition(begin)
    assert found and END in rest, f"{PAGE.name} has no place for the table {name}"
    PAGE.write_text(f"{head}{begin}\n{text}\n{END}{rest.partition(END)[2]}")
