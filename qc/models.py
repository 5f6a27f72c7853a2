"""The models of a recipe: what they are made of, and the graphs that its passes rewrite.

A recipe has one model, or several by name. Of several, each has a graph of its own until a pass joins them.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from graph.errors import QcError
from qc.runs import identity
from recipes.schema import Model, PassStep, Recipe

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

ONLY = ""
"""The name of a graph that is alone."""


def models_of(recipe: Recipe) -> dict[str, Model]:
    """The models by name; a single one has none."""
    return dict(recipe.models) if recipe.models else {ONLY: Model(model=str(recipe.model))}


def named(recipe: Recipe) -> str:
    """The model, or the models, in words."""
    return ", ".join(f"{name} {one.model}".strip() for name, one in models_of(recipe).items())


def source_of(recipe: Recipe) -> str:
    """A hash of the files of all models."""
    models = models_of(recipe)
    if list(models) == [ONLY]:
        return identity(models[ONLY].model)
    found = [(name, asdict(one) | {"model": identity(one.model)}) for name, one in models.items()]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def tokenizers(recipe: Recipe) -> tuple[Path, Path | None]:
    """The folders with the tokenizers of the model that speaks, and of the one that reads chunks where there is one."""
    from graph.checkpoint import locate

    models = models_of(recipe)
    if list(models) == [ONLY]:
        return locate(models[ONLY].model), None
    link = next((s.step for stage in recipe.plan() for s in stage.passes if s.step.links), None)
    decoder, encoder = (getattr(link, key, None) for key in ("decoder", "encoder"))
    last = list(models)[-1]
    folder = locate(models[decoder if decoder in models else last].model)
    return folder, locate(models[encoder].model) if encoder in models else None


def capture_all(recipe: Recipe, *, plan: bool = False) -> dict[str, Any]:
    """The graphs before the passes; without weights for a ``plan``. What several models share is captured once."""
    from graph.binding import apart

    models, found = models_of(recipe), dict[str, Any]()
    for one in models.values():
        if one.model not in found:
            found[one.model] = _captured(one.model, recipe.dtype, plan)
    shared = [source for source, count in Counter(one.model for one in models.values()).items() if count > 1]
    graphs = {name: apart(found[m.model]) if m.model in shared else found[m.model] for name, m in models.items()}
    return {name: _as_asked(graphs[name], one) for name, one in models.items()}


def _captured(model: str, dtype: str, plan: bool) -> Any:
    import torch

    from graph import capture
    from graph.checkpoint import locate, read_config, weight_files

    source: Any = model
    if plan:
        folder = locate(model)
        if any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")):
            weight_files(folder)
        else:
            source = read_config(folder)
    return capture(source, dtype=getattr(torch, DTYPES[dtype]), weights=not plan)


def _as_asked(graph: Any, model: Model) -> Any:
    """The graph of a model, as the recipe wants it: without a head where it encodes, and looking as it is told to."""
    from graph.encoder import as_encoder, set_attention

    if model.kind == "causal-lm" and graph.kind != "causal-lm":
        raise QcError(f"{model.model} is no language model", fix="take kind: causal-lm out, or give another model")
    if model.kind == "encoder":
        as_encoder(graph)
    return graph if model.attention is None else set_attention(graph, model.attention)


class Workshop:
    """The graphs of a recipe while passes rewrite them."""

    def __init__(self, graphs: Mapping[str, Any]):
        self.graphs = dict(graphs)

    @property
    def graph(self) -> Any:
        """The graph in the end; several are an error."""
        if len(self.graphs) > 1:
            what = f"the recipe ends with several graphs: {', '.join(self.graphs)}"
            raise QcError(what, fix="add attach-memory, which makes one of them")
        return next(iter(self.graphs.values()))

    def __str__(self) -> str:
        """The text of all graphs, each under its name where there are several."""
        if len(self.graphs) == 1:
            return f"{self.graph}\n"
        return "\n".join(f"# {name}\n{graph}\n" for name, graph in self.graphs.items())

    def copy(self) -> Workshop:
        """The same graphs again, over the same tensors."""
        return Workshop({name: graph.copy() for name, graph in self.graphs.items()})

    def do(
        self, step: PassStep, apply: Callable[[PassStep, Any], Any], link: Callable[[PassStep, Mapping[str, Any]], Any]
    ) -> dict[str, Any]:
        """Run a step on the graphs it is about; the report for each, by the name of its model."""
        if step.step.links:
            made, report = link(step, self.graphs)
            self.graphs = {ONLY: made}
            return {ONLY: report}
        if step.on is not None and step.on != "*" and step.on not in self.graphs:
            what = f"on: {step.on}, but the models are one graph by now"
            fix = f"take on: out, and select {{name: '{step.on}.*'}} where it matters"
            raise QcError(what, fix=fix, line=step.line)
        chosen = list(self.graphs) if step.on in (None, "*") else [str(step.on)]
        if step.on is None and len(chosen) > 1:
            raise QcError(
                f"{step.kind} does not say which model it rewrites", fix=f"add on: {chosen[0]}", line=step.line
            )
        return {name: apply(step, self.graphs[name]) for name in chosen}
