"""The documents with commands in them, run from the first block to the last in one folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, blocks
from tests.docs.reader import Reader
from tests.qc.command import python


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    """Somebody in an empty folder."""
    folder = tmp_path / "project"
    folder.mkdir()
    return Reader(folder, tmp_path / "installed")


def test_the_tutorial_does_what_it_says(reader: Reader) -> None:
    reader.read(blocks("docs/tutorial.md"))
    assert len(list((reader.folder / "runs/mine").iterdir())) == 2, "one run for each set of overrides"
    assert not (ROOT / "runs/mine").exists(), "a run went into the repository"


def test_the_readme_shows_what_is_printed(reader: Reader) -> None:
    shown = [block for block in blocks("README.md") if block.kind == "console" or block.file]
    assert len(shown) == 5
    reader.read(shown)


def test_the_page_of_models_says_how_to_capture_one(tmp_path: Path) -> None:
    (block,) = [block for block in blocks("docs/models.md") if block.kind == "python"]
    done = python(block.text, cwd=tmp_path)
    assert (done.code, done.both) == (0, "2 68\n")
