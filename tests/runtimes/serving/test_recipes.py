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

TERNARY = {"ternary", "ternary-handoff", "ternary-quality", "ternary-speed"}
"""Those that end in ternary weights."""


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
            assert [error.what for error in found] == ["the graph has no ternary weights"] * (target == "int2"), target
            continue
        if recipe in TERNARY and target == "int2":
            assert found == []
            continue
        (error,) = found
        assert "holds" in error.what
        assert f"as {target} it would be rounded twice" in error.what
        assert error.site is not None
        own = "int2" if recipe in TERNARY else "safetensors"
        again = f"export to {own}, or add the pass dequantize before the export, which then rounds to {target}"
        assert error.fix == (again if target != "int2" else "export to int4 after the pass dequantize")
    assert set(TARGETS) < set(targets())
