"""train.when: what is near enough to the model it came from is not trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from graph import QcError
from qc.runs import Run
from qc.training import spare_stage
from recipes.load import draft
from recipes.schema import Stage
from runtimes.settings import PythonStdlib, Train


def stage(when: str | None) -> Stage:
    return Stage(name="tune", train=Train(data=PythonStdlib(), steps=1, lr=1e-3, when=when))


def measured(folder: Path, compiled: float) -> Run:
    run = Run(folder)
    (folder / "tune" / "compiled").mkdir(parents=True)
    (folder / "tune" / "compiled" / "manifest.json").write_text("{}")
    run.measure("start", perplexity=20.0)
    run.measure("tune/compiled", perplexity=compiled)
    return run


@pytest.mark.parametrize(
    ("when", "compiled"), [("perplexity_increase > 5 %", 20.9), ("perplexity_increase>0.06", 21.1)]
)
def test_within_the_limit_the_compiled_artifact_goes_on(tmp_path: Path, when: str, compiled: float) -> None:
    told: list[str] = []
    run = measured(tmp_path, compiled)
    spared = spare_stage(run, stage(when), tmp_path / "tune/compiled", told.append)
    assert spared == tmp_path / "tune" / "trained"
    assert (spared / "manifest.json").read_text() == "{}"
    assert told[-1] == f"tune: not trained: {when} does not hold"


@pytest.mark.parametrize("when", ["perplexity_increase > 5 %", None])
def test_beyond_the_limit_or_without_one_it_is_trained(tmp_path: Path, when: str | None) -> None:
    told: list[str] = []
    assert spare_stage(measured(tmp_path, 21.2), stage(when), tmp_path / "tune/compiled", told.append) is None
    assert not (tmp_path / "tune" / "trained").exists()
    assert told == (["tune: perplexity grew by 6.00%, more than 5.00%"] if when else [])


def test_several_models_have_no_perplexity_to_compare_with(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.measure("tune/compiled", perplexity=20.0)
    with pytest.raises(QcError) as caught:
        spare_stage(run, stage("perplexity_increase > 5 %"), tmp_path / "tune/compiled", lambda _: None)
    assert str(caught.value) == (
        "tune: train.when compares with the model as it came, and the recipe begins with several\n"
        "  fix    set when to null"
    )


@pytest.mark.parametrize(
    ("when", "evaluate", "what"),
    [
        ("perplexity > 5", "evaluate: {metrics: [perplexity]}\n", "train.when cannot be 'perplexity > 5'"),
        ("perplexity_increase > 5 %", "", "train.when asks for a perplexity, and nothing here measures it"),
        (
            "perplexity_increase > 5 %",
            "evaluate: {metrics: [embedding]}\n",
            "train.when asks for a perplexity, and evaluate compares vectors",
        ),
    ],
)
def test_a_condition_that_nobody_can_judge_is_a_mistake(tmp_path: Path, when: str, evaluate: str, what: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    train = f"train: {{data: python-stdlib, steps: 1, lr: 1.0e-3, when: {when}}}\n"
    recipe.write_text(f"model: seedling\npasses: [{{ternary-ste: {{}}}}]\n{train}{evaluate}")
    _, errors = draft(recipe)
    assert [error.what for error in errors] == [what]
