import pytest

from recipes import shipped
from recipes.load import load


@pytest.mark.parametrize("name", shipped.names())
def test_every_shipped_recipe_loads(name: str) -> None:
    recipe = load(name)
    assert (recipe.name, recipe.model) == (name, "seedling")
    assert load(shipped.path(name)).digest() == recipe.digest()


def test_every_shipped_recipe_says_what_it_is_for() -> None:
    told = dict(shipped.shipped())
    assert {"quickstart", "qlora", "fp16"} <= set(told)
    assert all(len(text) > 20 for text in told.values())
    assert told["fp16"].startswith("The model as it is, in FP16 safetensors")


@pytest.mark.parametrize("name", ["quickstart", "qlora"])
def test_the_steps_of_the_shipped_recipes_are_set_by_their_names(name: str) -> None:
    recipe = load(name, {"lora.rank": 3, "tune.train.steps": 7})
    assert recipe.stages[0].train
    assert recipe.stages[0].train.steps == 7
    assert recipe.resolved()["stages"][0]["passes"][1]["add-lora"]["rank"] == 3
