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


def with_other_rows(name: str, text: str, page: str = "quality.md") -> str:
    """``text``, of a part that was run again, with what the table that is there has beyond it: rows, and text below."""
    _, _, rest = (DOCS / page).read_text().partition(f"<!-- table: {name} -->")
    lines, old = text.splitlines(), rest.partition(END)[0].strip().splitlines()
    rows, others = _rows(lines), _rows(old)
    below = lines[2 + len(rows) :] or old[2 + len(others) :]
    return "\n".join([*lines[:2], *(others | rows).values(), *below])


def _rows(lines: list[str]) -> dict[str, str]:
    """The rows of a table by what their first column says, without the line that names the columns."""
    return {line.split("|")[1].strip(): line for line in [line for line in lines if line.startswith("| ")][1:]}
