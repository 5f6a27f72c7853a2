"""A part of a table that was run again leaves the rest of it as it is."""

from pathlib import Path

import pytest

from tools.bench.tables import replace_table, with_other_rows

HEAD = "| | perplexity |\n|---|---|"
PAGE = f"Before.\n\n<!-- table: one -->\n{HEAD}\n| a | 1 |\n| b | 2 |\n\nOf last week.\n<!-- end -->\n\n| c | 3 |\n"


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tools.bench.tables.DOCS", tmp_path)
    (tmp_path / "page.md").write_text(PAGE)
    return tmp_path / "page.md"


def test_rows_that_were_not_run_stay_where_they_are(page: Path) -> None:
    text = with_other_rows("one", f"{HEAD}\n| b | 5 |\n| d | 6 |\n\nOf today.", page.name)
    assert text == f"{HEAD}\n| a | 1 |\n| b | 5 |\n| d | 6 |\n\nOf today."
    replace_table("one", text, page.name)
    assert page.read_text() == PAGE.replace("| b | 2 |\n\nOf last week.", "| b | 5 |\n| d | 6 |\n\nOf today.")


def test_text_below_stays_where_the_part_says_nothing(page: Path) -> None:
    assert with_other_rows("one", f"{HEAD}\n| b | 5 |", page.name) == f"{HEAD}\n| a | 1 |\n| b | 5 |\n\nOf last week."


def test_a_table_that_is_not_there_yet_is_what_was_run(page: Path) -> None:
    page.write_text("<!-- table: one -->\n<!-- end -->\n")
    assert with_other_rows("one", f"{HEAD}\n| b | 5 |", page.name) == f"{HEAD}\n| b | 5 |"
