"""The tables of pages under docs/, which commands of ``tools`` print and put there."""

from __future__ import annotations

from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
END = "<!-- end -->"


def replace_table(name: str, text: str, page: str = "quality.md") -> None:
    """Put ``text`` between the marks of that name."""
    path, begin = DOCS / page, f"<!-- table: {name} -->"
    head, found, rest = path.read_text().partition(begin)
    assert found and END in rest, f"{page} has no place for the table {name}"
    path.write_text(f"{head}{begin}\n{text}\n{END}{rest.partition(END)[2]}")
