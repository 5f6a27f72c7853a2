"""The tables of docs/quality.md and docs/retrieval.md, which commands of ``tools`` print and put there."""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "quality.md"
END = "<!-- end -->"


def replace_table(name: str, text: str, page: Path = PAGE) -> None:
    """Put ``text`` between the marks of that name on a page."""
    begin = f"<!-- table: {name} -->"
    head, found, rest = page.read_text().partition(begin)
    assert found and END in rest, f"{page.name} has no place for the table {name}"
    page.write_text(f"{head}{begin}\n{text}\n{END}{rest.partition(END)[2]}")
