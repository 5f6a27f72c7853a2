"""The corpus of broken recipes: each mistake at its line and column, with its fix, and nothing else said."""

import json
from pathlib import Path

import pytest

from tests.qc.command import python
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
    assert mistakes(write("recipe.yaml", case.text)) == [f"recipe.yaml:{said}" for said in case.said]


TIMED = """
import json
import time
import tests.recipes.plugin  # torch comes with it, which the first recipe would be charged for
from passes import registry
from tests.recipes.conftest import POINTS
from tests.recipes.corpus import broken
from tests.recipes.reading import mistakes, write

registry._plugins, registry.shipped = lambda: POINTS, list
found = {}
for case in broken():
    path = write("recipe.yaml", case.text)
    start = time.process_time()
    told = mistakes(path)
    found[case.name] = time.process_time() - start
    assert told == [f"recipe.yaml:{said}" for said in case.said]
print(json.dumps(found))
"""


def test_no_broken_recipe_takes_a_second(folder: Path) -> None:
    """In a new process: one that ran other tests is also charged for collecting what they left."""
    done = python(TIMED, cwd=folder, path=[Path(__file__).parents[2]])
    assert done.code == 0, done.both
    found = json.loads(done.both)
    assert found.keys() == {case.name for case in CORPUS}
    assert max(found.values()) < 1, json.dumps(found)
