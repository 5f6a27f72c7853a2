"""All of a recipe, in order, and the table at its end."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graph.tokenizer import load_tokenizer
from qc.assessing import assess_stage, audit_stage
from qc.caching import make_cache
from qc.compiling import compile_stage
from qc.console import size, table
from qc.exporting import export_stage
from qc.measuring import check_gates, evaluate_stage, folder_bytes, measure, weights_of
from qc.runs import Run
from qc.training import spare_stage, start_of, train_stage
from recipes.metrics import EXPORTED
from recipes.schema import Recipe
from runtimes.settings import Evaluate

Tell = Callable[[str], None]


def run_recipe(run: Run, recipe: Recipe, tell: Tell, processes: int = 1) -> None:
    """Every stage in order: passes, a look at gradients and text, training, figures, gates, exports.

    Passes divide their work on weights among so many ``processes``.
    """
    began = time.perf_counter()
    artifact: Path | None = None
    done: dict[str, Path] = {}
    if recipe.cache is not None:
        make_cache(recipe, run.folder.parent.parent, force=False, tell=tell)
    for stage in recipe.plan():
        compares = artifact is None or (stage.train is not None and stage.train.when is not None)
        if compares and stage.evaluate is not None and recipe.model is not None:
            _measure_start(run, recipe, stage.evaluate, tell)
        parent = artifact if stage.start is None else done[stage.start]
        artifact = compile_stage(run, recipe, stage, parent, tell=tell, processes=processes)
        if stage.evaluate is not None:
            evaluate_stage(run, recipe, stage, "compiled", artifact, tell)
        if stage.audit is not None:
            audit_stage(run, recipe, stage, artifact, tell)
        if stage.assess is not None:
            assess_stage(run, recipe, stage, artifact, tell)
        if stage.train is not None:
            artifact = spare_stage(run, stage, artifact, tell) or train_stage(run, recipe, stage, tell=tell)
            if stage.evaluate is not None:
                evaluate_stage(run, recipe, stage, "trained", artifact, tell)
        done[stage.name] = artifact
        check_gates(run, stage, [g for g in stage.require if g.metric not in EXPORTED], artifact, tell)
        for wanted in stage.export:
            export_stage(run, stage, wanted, artifact, tell)
        check_gates(run, stage, [g for g in stage.require if g.metric in EXPORTED], artifact, tell)
    run.measure("total", seconds=time.perf_counter() - began, folder=str(run.folder))


def _measure_start(run: Run, recipe: Recipe, wanted: Evaluate, tell: Tell) -> None:
    """The figures of the model as it came."""
    if any(m["step"] == "start" for m in run.measured()):
        return
    import torch

    from graph.checkpoint import locate
    from qc.compiling import DTYPES

    start = time.perf_counter()
    folder = locate(str(recipe.model))
    graph = start_of(str(recipe.model), getattr(torch, DTYPES[recipe.dtype]))
    found = measure(graph, None, load_tokenizer(folder, str(folder)), recipe, wanted, run)
    stored = folder_bytes(folder)
    seconds = time.perf_counter() - start
    run.measure(
        "start",
        **found,
        bits_per_weight=8 * stored / weights_of(str(folder)),
        bytes=stored,
        seconds=seconds,
        folder=str(folder),
    )
    if "perplexity" in found:
        tell(f"start: perplexity {found['perplexity']:.4g}")


def summary(run: Run) -> str:
    """The table at the end of a run."""
    head = ["step", "size", "bits/weight", "perplexity", "KL (nats)", "top-1", "seconds", "where"]
    rows = []
    for m in run.measured():
        shown = [
            size(m["bytes"]) if "bytes" in m else "",
            *(_cell(m.get(k)) for k in ("bits_per_weight", "perplexity", "kl", "top1")),
        ]
        rows.append([m["step"], *shown, _cell(m.get("seconds"), ".1f"), str(m.get("folder", ""))])
    return table(rows, head)


def _cell(value: Any, form: str = ".4g") -> str:
    return format(value, form) if isinstance(value, (int, float)) else ""
