from pathlib import Path

import pytest

from recipes.load import load
from runtimes import settings
from tests.recipes.plugin import Adapt, Seal, Squeeze
from tests.recipes.reading import mistakes, read, write

pytestmark = pytest.mark.usefixtures("folder")

BASE = """
    model: ./qwen3-tiny
    passes:
      - squeeze: {bits: 3, block: 32, select: {role: attn.*, exclude: attn.o}}
        name: base
      - adapt: {rank: 4}
    train:
      data: {text: corpus/*.txt}
      steps: 100
      groups: {a: {lr: 1.0}}
"""


def test_maps_merge_and_lists_replace() -> None:
    write("base.yaml", BASE)
    recipe = read("extends: base.yaml\nseed: 3\npasses: [seal]\ntrain: {steps: 5, groups: {a: {warmup: 2}}}")
    assert recipe.train
    assert recipe.train.groups == {"a": settings.Group(lr=1.0, warmup=2.0)}
    assert (recipe.seed, recipe.train.steps, recipe.train.batch) == (3, 5, 8)
    assert [step.step for step in recipe.passes] == [Seal()]


def test_steps_of_the_base_are_changed_by_their_names() -> None:
    write("base.yaml", BASE)
    recipe = read("extends: base.yaml\npasses: [{adapt: {alpha: 2.0}, name: adapt}, {squeeze: {bits: 5}, name: base}]")
    assert [step.name for step in recipe.passes] == ["base", "adapt"]
    squeeze, adapt = (step.step for step in recipe.passes)
    assert isinstance(squeeze, Squeeze)
    assert (squeeze.bits, squeeze.block, squeeze.select.exclude) == (5, 32, "attn.o")
    assert adapt == Adapt(rank=4, alpha=2.0)


def test_a_new_list_of_steps_can_take_some_from_the_base() -> None:
    write("base.yaml", BASE)
    recipe = read("extends: base.yaml\npasses: [{squeeze: , name: base}, seal]")
    assert [step.kind for step in recipe.passes] == ["squeeze", "seal"]
    assert isinstance(recipe.passes[0].step, Squeeze)
    assert recipe.passes[0].step.bits == 3


def test_an_empty_list_of_steps_is_empty_and_null_clears_a_section() -> None:
    write("base.yaml", BASE)
    recipe = read("extends: base.yaml\npasses: []\ntrain: null")
    assert (recipe.passes, recipe.train) == ((), None)


def test_a_choice_is_replaced_as_a_whole() -> None:
    write("base.yaml", BASE)
    recipe = read("""
        extends: base.yaml
        passes: [{squeeze: {select: {role: mlp.*}}, name: base}]
        train: {data: {jsonl: corpus/*.jsonl}}
    """)
    assert recipe.train
    assert isinstance(recipe.train.data, settings.JsonLines)
    assert recipe.passes[0].step.select.exclude is None


def test_stages_are_changed_by_their_names() -> None:
    export = "export: [{target: safetensors}]"
    write("base.yaml", f"model: seedling\nstages: [{{name: a, passes: [squeeze]}}, {{name: b, {export}}}]")
    recipe = read("extends: base.yaml\nstages: [{name: a, train: {data: python-stdlib, steps: 3, lr: 1.0}}]")
    assert [stage.name for stage in recipe.stages] == ["a", "b"]
    assert recipe.stages[0].train
    assert [step.kind for step in recipe.stages[0].passes] == ["squeeze"]


def test_later_bases_go_on_top_of_earlier_ones_and_includes_on_top_of_bases() -> None:
    write("one.yaml", "model: seedling\nseed: 1\nname: one\ndtype: bf16")
    write("two.yaml", "seed: 2\nname: two")
    write("three.yaml", "name: three")
    recipe = read("extends: [one.yaml, two.yaml]\ninclude: three.yaml")
    assert (recipe.dtype, recipe.seed, recipe.name) == ("bf16", 2, "three")


def test_a_section_can_include_a_file_of_its_own() -> None:
    write("parts/train.yaml", "data: {text: ../corpus/*.txt}\nsteps: 7\nlr: 1.0")
    recipe = read("model: seedling\ntrain:\n  include: parts/train.yaml\n  steps: 8")
    assert recipe.train
    assert recipe.train.steps == 8
    assert recipe.train.data == settings.TextFiles(text=str(Path.cwd() / "corpus/*.txt"))


def test_paths_start_where_they_are_written() -> None:
    write("bases/base.yaml", BASE.replace("./qwen3-tiny", "../qwen3-tiny").replace("corpus/", "../corpus/"))
    recipe = read("extends: bases/base.yaml")
    assert recipe.model == str(Path.cwd() / "qwen3-tiny")


def test_a_mistake_in_a_base_is_told_in_the_base_and_the_own_ones_too() -> None:
    write("base.yaml", "model: seedling\npasses:\n  - squeeze: {bits: '4'}\n")
    write("recipe.yaml", "extends: base.yaml\nsead: 3\n")
    assert mistakes("recipe.yaml") == [
        "recipe.yaml:2:1 | the recipe has no 'sead' | did you mean 'seed'?",
        "base.yaml:3:21 | squeeze.bits needs a whole number, not '4' | write 4, without quotes",
    ]


def test_what_a_base_that_cannot_be_read_might_hold_is_not_missed() -> None:
    write("base.yaml", "model: seedling\ntrain: {steps: 3\n")
    write("recipe.yaml", "extends: [base.yaml, bas.yaml]\nsead: 3\ntrain: {steps: 3}\n")
    assert mistakes("recipe.yaml") == [
        "base.yaml:3:1 | a bracket is never closed | close the [ or { of line 2",
        "recipe.yaml:1:22 | there is no recipe 'bas.yaml' | did you mean 'base.yaml'?",
        "recipe.yaml:2:1 | the recipe has no 'sead' | did you mean 'seed'?",
    ]


def test_a_circle_is_told_with_every_link() -> None:
    write("a.yaml", "# a\nextends: b.yaml\nmodel: seedling")
    write("b.yaml", "train:\n  include: sub/c.yaml")
    write("sub/c.yaml", "extends:\n  - ../a.yaml")
    write("recipe.yaml", "extends: a.yaml")
    assert mistakes("recipe.yaml") == [
        "sub/c.yaml:2:5 | a.yaml extends itself: a.yaml:2:10 names b.yaml, b.yaml:2:12 names sub/c.yaml, "
        "sub/c.yaml:2:5 names a.yaml | take one extends out"
    ]


def test_the_same_base_by_two_ways_is_no_circle() -> None:
    write("base.yaml", "model: seedling")
    write("a.yaml", "extends: base.yaml")
    write("b.yaml", "extends: base.yaml\nseed: 4")
    assert read("extends: [a.yaml, b.yaml]").seed == 4


def test_a_shipped_recipe_can_be_extended() -> None:
    recipe = read("extends: fp16\nname: mine\nexport: [{target: safetensors, dtype: bf16}]")
    assert (recipe.model, recipe.name, recipe.export[0].dtype) == ("seedling", "mine", "bf16")
    assert load("fp16").export[0].dtype == "fp16"
