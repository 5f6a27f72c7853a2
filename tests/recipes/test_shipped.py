from typing import Any

import pytest

from recipes import shipped
from recipes.load import load


@pytest.mark.parametrize("name", shipped.names())
def test_every_shipped_recipe_loads(name: str) -> None:
    recipe = load(name)
    models = [one.model for one in recipe.models.values()] if recipe.models else [recipe.model]
    assert (recipe.name, set(models)) == (name, {"seedling"})
    assert load(shipped.path(name)).digest() == recipe.digest()


def test_every_shipped_recipe_says_what_it_is_for() -> None:
    told = dict(shipped.shipped())
    assert {"quickstart", "qlora", "fp16"} <= set(told)
    assert all(len(text) > 20 for text in told.values())
    assert told["fp16"].startswith("The model as it is, in FP16 safetensors")


@pytest.mark.parametrize(
    ("name", "stage", "step", "option", "path"),
    [
        ("quickstart", "scales", "base.lut.rank", 3, ("quantize-base", "lut", "rank")),
        ("qlora", "tune", "lora.rank", 3, ("add-lora", "rank")),
        ("awareness", "learn", "gca.every_n", 3, ("insert-gca", "every_n")),
    ],
)
def test_the_steps_of_the_shipped_recipes_are_set_by_their_names(
    name: str, stage: str, step: str, option: int, path: tuple[str, ...]
) -> None:
    preset = {"base.lut.preset": None, "base.lut.bits": 2} if name == "quickstart" else {}
    recipe = load(name, {step: option, f"{stage}.train.steps": 7, **preset})
    assert recipe.stages[0].train
    assert recipe.stages[0].train.steps == 7
    found: Any = next(each for each in recipe.resolved()["stages"][0]["passes"] if path[0] in each)
    for key in path:
        found = found[key]
    assert found == option
