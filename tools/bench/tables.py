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


def table_rows(name: str, page: str = "quality.md") -> dict[str, str]:
    """The rows of a table that is there, by what their first column says."""
    _, _, rest = (DOCS / page).read_text().partition(f"<!-- table: {name} -->")
    lines = [line for line in rest.partition(END)[0].splitlines() if line.startswith("| ")]
    return {line.split("|")[1].strip(): line for line in lines[1:]}
