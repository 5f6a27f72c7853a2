"""The teacher's cache of a recipe: where it lies, making it, and handing it to a training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graph.errors import QcError
from qc.console import size
from qc.runs import identity
from recipes.load import load
from recipes.schema import Recipe
from runtimes.settings import Cache, KdCache, Train

if TYPE_CHECKING:
    from graph import Graph
    from runtimes.distill.writer import Made

Tell = Callable[[str], None]


def make_cache(recipe: Recipe, runs: Path, *, force: bool, tell: Tell) -> Made:
    """The cache that ``recipe`` describes, made or taken as it is."""
    from graph.checkpoint import locate
    from graph.tokenizer import load_tokenizer
    from runtimes.distill.writer import Source, make

    settings = _settings(recipe)
    model = str(recipe.model)
    folder = locate(model)
    source = Source(
        graph=lambda: _captured(recipe), tokenizer=load_tokenizer(folder, str(folder)), model=_name(model),
        teacher=identity(model), dtype=recipe.dtype, root=recipe.file.parent, tokens=runs / ".cache" / "tokens",
    )  # fmt: skip
    place = cache_folder(recipe, runs)
    made = make(settings, source, place, seed=recipe.seed, force=force, tell=tell)
    speed = f", {made.tokens_per_second:,.0f} tokens/s" if made.written else ", nothing left to do"
    tell(f"cache: {size(made.bytes)} in {made.shards} shards, {made.bytes_per_token:.1f} bytes a token{speed}")
    return made


def cache_folder(recipe: Recipe, runs: Path) -> Path:
    """Where the cache of ``recipe`` lies, made or not."""
    settings = _settings(recipe)
    if settings.out is not None:
        return Path(settings.out)
    content = {**recipe.resolved()["cache"], "out": None, "seed": settings.seed or recipe.seed}
    said_ = json.dumps([content, identity(str(recipe.model)), recipe.dtype], sort_keys=True)
    return runs / ".cache" / "teacher" / f"{recipe.name}-{hashlib.sha256(said_.encode()).hexdigest()[:12]}"


def with_cache(train: Train, recipe: Recipe, runs: Path, tell: Tell) -> Train:
    """``train``, its objective kd-cache naming a folder; where it names a recipe, that recipe's cache is made first."""
    objective = train.objective
    if not isinstance(objective, KdCache):
        return train
    named = Path(objective.cache) if objective.cache is not None else None
    if named is None or not named.is_dir():
        maker = recipe if named is None else load(named)
        named = make_cache(maker, runs, force=False, tell=tell).folder
    return replace(train, objective=replace(objective, cache=str(named.resolve())))


def said(made: Made) -> dict[str, Any]:
    """What ``qc cache teacher --json`` says."""
    return {**asdict(made), "folder": str(made.folder)}


def _captured(recipe: Recipe) -> Graph:
    import torch

    from graph import capture
    from qc.compiling import DTYPES

    return capture(str(recipe.model), dtype=getattr(torch, DTYPES[recipe.dtype]))


def _settings(recipe: Recipe) -> Cache:
    if recipe.cache is None:
        raise QcError(
            f"{recipe.file.name} makes no cache",
            line=str(recipe.file),
            fix="add cache: {data: python-stdlib, sequences: 2048}; qc recipes copy kd-cache gives an example",
        )
    if recipe.model is None:
        raise QcError(
            "a cache has one teacher, and the recipe has several models", line=str(recipe.file), fix="give one model:"
        )
    return recipe.cache


def _name(model: str) -> str:
    """A model as a cache names it: no path of this machine."""
    return model if not Path(model).is_absolute() else Path(model).name
