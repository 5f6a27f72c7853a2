from pathlib import Path

import pytest

from tests.recipes.plugin import Adapt, Squeeze
from tests.recipes.reading import TRAIN, complaints, read

pytestmark = pytest.mark.usefixtures("folder")

RECIPE = f"""
model: seedling
passes:
  - squeeze: {{bits: 3}}
  - squeeze: {{bits: 4}}
    name: quant-mlp
  - adapt: {{rank: 4}}
{TRAIN}
require: [{{metric: train/loss, op: "<", value: 3}}]
"""


def test_a_section_is_set_by_its_path() -> None:
    recipe = read(RECIPE, ["train.steps=7", "train.lr=1e-5", "seed=3", "require.0.value=2.5", "dtype=bf16"])
    assert recipe.train
    assert (recipe.train.steps, recipe.train.lr, recipe.seed, recipe.dtype) == (7, 1e-5, 3, "bf16")
    assert recipe.require[0].value == 2.5


def test_a_pass_is_set_by_the_name_of_its_step_or_its_own() -> None:
    recipe = read(RECIPE, ["quant-mlp.bits=2", "adapt.rank=8", "adapt.select.role=[attn.q, attn.v]"])
    first, second, adapt = (step.step for step in recipe.passes)
    assert isinstance(first, Squeeze)
    assert isinstance(second, Squeeze)
    assert isinstance(adapt, Adapt)
    assert (first.bits, second.bits, adapt.rank, adapt.select.role) == (3, 2, 8, ("attn.q", "attn.v"))


def test_values_from_python_are_taken_as_they_are() -> None:
    name = "ünïcode \U0001f600"
    recipe = read(RECIPE, {"adapt.rank": 9, "adapt.pattern": {"a": 1}, "name": name, "model": Path("qwen3-tiny")})
    assert recipe.passes[2].step == Adapt(rank=9, pattern={"a": 1})
    assert (recipe.name, recipe.model) == (name, str(Path.cwd() / "qwen3-tiny"))


def test_sections_and_options_that_are_not_there_are_made() -> None:
    recipe = read(RECIPE, ["evaluate.batches=3", "train.groups={a: {lr: 1.0}}", "train.lr=", "probe.length=8"])
    assert recipe.evaluate
    assert recipe.train
    assert recipe.train.groups
    assert (recipe.evaluate.batches, list(recipe.train.groups), recipe.probe.length) == (3, ["a"], 8)


def test_a_path_is_relative_to_the_current_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder / "corpus")
    assert read(RECIPE, ["model=../qwen3-tiny"]).model == str(folder / "qwen3-tiny")


def test_a_stage_is_set_by_its_name() -> None:
    text = """
        model: seedling
        stages:
          - {name: a, passes: [squeeze]}
          - {name: b, passes: [squeeze], train: {data: python-stdlib, steps: 3, lr: 1.0}}
    """
    export = "stages.0.export=[{target: safetensors}]"
    recipe = read(text, ["b.train.steps=5", "b.squeeze.bits=7", "a.squeeze.name=first", export])
    assert recipe.stages[1].train
    assert recipe.stages[1].train.steps == 5
    assert isinstance(recipe.stages[1].passes[0].step, Squeeze)
    assert recipe.stages[1].passes[0].step.bits == 7
    assert [step.name for stage in recipe.stages for step in stage.passes] == ["first", "squeeze"]
    assert len(recipe.stages[0].export) == 1


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.stpes=1", "train has no 'stpes' | did you mean 'steps'?"),
        ("trian.steps=1", "the recipe has no 'trian' | did you mean 'train'?"),
        ("quant-mpl.bits=1", "the recipe has no 'quant-mpl' | did you mean 'quant-mlp'?"),
        ("adapt.rnak=1", "adapt has no 'rnak' | did you mean 'rank'?"),
        ("adapt.rank=four", "adapt.rank needs a whole number, not 'four' | write a whole number: rank of the update"),
        ("squeeze.bits=3", "'squeeze' is 2 steps | say squeeze-1 or quant-mlp"),
        ("adapt=4", "'adapt' is a step | set an option of it: adapt.OPTION=VALUE"),
        ("train.steps", "'train.steps' sets nothing | write --set train.steps=100"),
        ("train.steps=[1", "a bracket is never closed | close the [ or { of line 1"),
        ("train.steps.more=1", "steps is 100, which has no 'more' | set train.steps="),
        ("require.3.value=1", "require has no item '3' | count from 0 to 0"),
        ("extends=other", "extends cannot be set | write a recipe that extends both, and use that"),
        ("model=./nowhere", "there is no model folder './nowhere' | write a path relative to the current folder"),
        ("train.precision=pf32", "train.precision cannot be 'pf32' | did you mean 'fp32'?"),
        ("=3", "'=3' sets nothing | write --set train.steps=100"),
        ("train..steps=3", "train has no '' | train has"),
    ],
)
def test_a_mistake_says_which_override_it_is_in(override: str, said: str) -> None:
    (told,) = complaints(RECIPE, [override])
    assert told.startswith(f"--set {override} | {said}")


def test_a_typo_adds_no_group() -> None:
    text = "model: seedling\ntrain: {data: python-stdlib, steps: 3, groups: {lora: {lr: 1.0}}}"
    assert complaints(text, ["train.groups.loar.lr=2.0"]) == [
        "--set train.groups.loar.lr=2.0 | groups has no 'loar' | did you mean 'lora'?"
    ]


def test_overrides_and_the_file_are_told_together() -> None:
    told = complaints("model: seedling\nsead: 3", {"dtype": 8})
    assert told == [
        "recipe.yaml:2:1 | the recipe has no 'sead' | did you mean 'seed'?",
        "--set dtype=8 | dtype cannot be 8 | write one of fp32, bf16, fp16",
    ]
