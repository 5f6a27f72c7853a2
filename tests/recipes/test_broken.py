"""The corpus of broken recipes: each mistake at its line and column, with its fix, and nothing else said."""

import time

import pytest

import tests.recipes.plugin  # noqa: F401 - torch comes with it, which the first recipe would be charged for
from tests.recipes.corpus import Broken, broken
from tests.recipes.reading import mistakes, write

CORPUS = broken()


def test_the_corpus_is_large_and_no_name_is_there_twice() -> None:
    assert len(CORPUS) >= 100
    assert len({case.name for case in CORPUS}) == len(CORPUS)
    assert sum(len(case.said) > 1 for case in CORPUS) >= 10


@pytest.mark.parametrize("case", CORPUS, ids=lambda case: case.name.replace(" ", "-"))
@pytest.mark.usefixtures("folder")
def test_every_mistake_is_told_at_its_place_with_its_fix(case: Broken) -> None:
    path = write("recipe.yaml", case.text)
    start = time.process_time()
    assert mistakes(path) == [f"recipe.yaml:{said}" for said in case.said]
    assert time.process_time() - start < 1
