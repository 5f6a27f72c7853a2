"""Every shipped recipe against every target: what its graph can be written as, and why not the rest."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from graph import QcError
from qc.compiling import plan
from recipes.load import load
from recipes.shipped import shipped
from runtimes.export import default_dtype, obstacles, targets
from runtimes.serving.settings import TARGETS

RECIPES = [name for name, _ in shipped()]
DENSE = {"fp16", "qlora", "kd-cache"}
"""The recipes that end in float weights."""


@cache
def final(recipe: str) -> tuple[Any, list[QcError]]:
    """The graph behind the last pass, without weights."""
    return plan(load(recipe))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_shipped_recipe_is_written_as_its_format_allows(recipe: str) -> None:
    graph, errors = final(recipe)
    assert not errors
    for target in TARGETS:
        found = obstacles(target, graph, default_dtype(target), {})
        if recipe in DENSE:
            assert found == [], target
            continue
        (error,) = found
        assert "holds" in error.what
        assert f"as {target} it would be rounded twice" in error.what
        assert error.site is not None
        assert error.fix == (
            f"export to safetensors, or add the pass dequantize before the export, which then rounds to {target}"
        )
    assert set(TARGETS) < set(targets())
