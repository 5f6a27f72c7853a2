"""The text on which ranges of inputs are found: the recipe's own, of the last stage that has any."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qc.exporting import _calibrated, _text, _text_of
from qc.runs import open_run
from recipes.load import load
from recipes.settings import Export
from tests.runtimes.data.byte_tokenizer import byte_tokenizer

RECIPE = """
model: seedling
stages:
  - name: first
    passes: []
    train: {data: {text: early/*.txt}, steps: 1, lr: 1.0e-3}
  - name: second
    passes: []
  - name: third
    passes: []
    train: {data: {text: late/*.txt}, steps: 1, lr: 1.0e-3}
"""


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """A run of a recipe whose stages train on a text of their own each."""
    for name, letter in (("early", "a"), ("late", "z")):
        (tmp_path / name).mkdir()
        for number in range(8):
            (tmp_path / name / f"{number}.txt").write_text(letter * 400)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    read = load(str(tmp_path / "recipe.yaml"))
    return SimpleNamespace(recipe=lambda: read, folder=tmp_path / "runs" / "recipe" / "key")


def loaded() -> Any:
    return SimpleNamespace(reads_text=True, tokenizer=Path("folder"), load_tokenizer=byte_tokenizer)


def letters(rows: dict[str, Any]) -> set[str]:
    """What the rows are written with."""
    tokenizer = byte_tokenizer()
    return {letter for ids in rows["rows"] for row in ids for letter in tokenizer.decode(row, skip_special_tokens=True)}


@pytest.mark.parametrize(("stage", "letter"), [("first", "a"), ("second", "a"), ("third", "z")])
def test_ranges_are_found_on_what_the_stage_or_one_before_it_trained_on(run: Any, stage: str, letter: str) -> None:
    stages = {one.name: one for one in run.recipe().plan()}
    rows = _calibrated(Export(target="nvfp4", calibration=300), loaded(), _text(run, stages[stage]))
    assert letters(rows) == {letter}
    assert sum(ids.numel() for ids in rows["rows"]) == 384, "three rows of 128, the fewest that hold 300 tokens"


def test_an_artifact_has_the_text_of_the_run_that_it_lies_in(run: Any, tmp_path: Path) -> None:
    real = open_run(run.recipe(), {}, tmp_path / "runs")
    for stage, letter in (("first", "a"), ("third", "z")):
        text = _text_of(real.folder / stage / "trained")
        assert letters(_calibrated(Export(target="nvfp4", calibration=300), loaded(), text)) == {letter}


def test_an_artifact_elsewhere_or_of_a_recipe_that_has_changed_has_no_text(run: Any, tmp_path: Path) -> None:
    assert _text_of(tmp_path / "carried" / "trained") is None
    real = open_run(run.recipe(), {}, tmp_path / "runs")
    assert _text_of(real.folder / "fourth" / "trained") is None
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("steps: 1", "steps: 2"))
    assert _text_of(real.folder / "third" / "trained") is None


def test_what_needs_no_ranges_reads_no_text(run: Any) -> None:
    text = _text(run, run.recipe().plan()[0])
    for wanted in (Export(target="fp8"), Export(target="int4"), Export(target="nvfp4", weight_only=True)):
        assert _calibrated(wanted, loaded(), text) == {}
    assert _calibrated(Export(target="fp8", scheme="static", calibration=128), loaded(), text)["rows"]
    assert _calibrated(Export(target="nvfp4"), loaded(), None) == {}, "an artifact by itself has no recipe"
