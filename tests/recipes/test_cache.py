"""The section ``cache:`` and the objective kd-cache."""

from pathlib import Path

import pytest

from recipes.load import load
from recipes.shipped import path
from runtimes import settings
from tests.recipes.reading import complaints, read, write

pytestmark = pytest.mark.usefixtures("folder")

CACHED = """
    model: seedling
    cache: {data: {text: corpus/*.txt}, sequences: 9}
    train:
      objective: {kd-cache: {hard_top1: 0.1, anneal: 0.5}}
      steps: 3
      lr: 1e-3
    evaluate: {metrics: [perplexity]}
"""


def test_a_cache_is_read_with_its_defaults() -> None:
    recipe = read(CACHED)
    data = settings.TextFiles(text=str(Path.cwd() / "corpus/*.txt"))
    assert recipe.cache == settings.Cache(
        data=data, sequences=9, heldout=64, length=128, packing=True, thinking=None, topk=64, negatives=0, batch=8,
        shard=256, seed=None, out=None,
    )  # fmt: skip
    assert recipe.train
    assert recipe.train.data is None
    assert recipe.train.objective == settings.KdCache(
        cache=None, temperature=2.0, tail=False, hard_top1=0.1, hard_full=0.0, hard_text=0.0, anneal=0.5
    )


def test_the_short_form_is_the_same_as_the_long_one() -> None:
    short, long = (
        read(
            f"model: seedling\ncache: {{data: python-stdlib, sequences: 9}}\ntrain: {{objective: {form}, steps: 3, lr: 1}}"
        )
        for form in ("kd-cache", "{name: kd-cache}")
    )
    assert short.train == long.train
    assert short.cache == settings.Cache(data=settings.PythonStdlib(), sequences=9)


def test_a_cache_is_a_folder_or_a_recipe_and_found_from_the_recipe_that_names_it() -> None:
    write("sub/maker.yaml", "model: seedling\ncache: {data: python-stdlib, sequences: 9}\n")
    for named, found in (
        ("made", Path.cwd() / "made"),
        ("./sub/maker.yaml", Path.cwd() / "sub/maker.yaml"),
        ("kd-cache", path("kd-cache")),
    ):
        recipe = read(f"model: seedling\ntrain: {{objective: {{kd-cache: {{cache: {named}}}}}, steps: 3, lr: 1}}")
        assert recipe.train and isinstance(recipe.train.objective, settings.KdCache)
        assert recipe.train.objective.cache == str(found)
    write("sub/trainer.yaml", "model: seedling\ntrain: {objective: {kd-cache: {cache: maker.yaml}}, steps: 3, lr: 1}\n")
    trainer = load("sub/trainer.yaml").train
    assert trainer and isinstance(trainer.objective, settings.KdCache)
    assert trainer.objective.cache == str(Path.cwd() / "sub/maker.yaml")


def test_what_is_resolved_is_itself_a_recipe_and_names_no_path_of_this_machine() -> None:
    recipe = read(CACHED.replace("hard_top1: 0.1", "hard_top1: 0.1, cache: made"))
    resolved = recipe.resolved()
    assert resolved["cache"]["data"] == {"text": "./corpus/*.txt"}
    assert resolved["train"]["objective"]["cache"] == "./made"
    assert str(Path.cwd()) not in str(resolved)
    assert "cache" not in read("model: seedling").resolved()


def test_a_recipe_with_another_cache_is_another_recipe() -> None:
    assert read(CACHED).digest() != read(CACHED, {"cache.topk": 8}).digest()


def test_an_override_of_a_cache_is_checked_like_the_recipe() -> None:
    assert read(CACHED, ["cache.topk=8", "cache.thinking=both"]).cache
    assert complaints(CACHED, ["cache.topk=0"]) == [
        "--set cache.topk=0 | cache.topk must be at least 1, not 0 | write a number from 1"
    ]


def test_the_data_of_training_may_be_that_of_the_cache() -> None:
    recipe = read(CACHED.replace("steps: 3", "steps: 3\n      data: {text: corpus/*.txt}"))
    assert recipe.train and recipe.cache
    assert recipe.train.data == recipe.cache.data
