"""Training the compiled artifact of a stage."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from graph.artifact import load, save
from graph.errors import QcError
from qc.caching import with_cache
from qc.compiling import stage_name, step_name, versions
from qc.models import named
from qc.runs import Run, link_tree
from recipes.schema import Recipe, Stage

Tell = Callable[[str], None]


def train_stage(run: Run, recipe: Recipe, stage: Stage, *, tell: Tell) -> Path:
    """Train the compiled artifact of a stage; the folder of the trained one. What is trained already stays as it is."""
    folder = run.stage(stage.name)
    if (folder / "trained" / "manifest.json").is_file():
        tell(f"{stage_name(stage)}trained before: {folder / 'trained'}")
        return folder / "trained"
    if stage.train is None:
        raise QcError(f"{recipe.file.name} trains nothing", fix="add train: to the recipe and compile it again")
    from runtimes.train import train

    compiled = load(folder / "compiled")
    start = time.perf_counter()
    graph = compiled.graph.materialize()
    taught = stage.train.objective.name in ("kd", "embedding") or stage.train.layerwise is not None
    if taught and recipe.models:
        what = f"{stage.train.objective.name} needs one model as the teacher, and the recipe has several"
        raise QcError(what, line=str(recipe.file), fix="set objective to causal-lm, and take layerwise out")
    teacher = start_of(str(recipe.model), compiled.graph.dtype) if taught else None
    if teacher is not None and stage.train.layerwise is None:
        _expect_to_learn(stage.train.objective, graph, teacher, str(recipe.file))
    settings = with_cache(stage.train, recipe, run.folder.parent.parent, tell)
    report = train(
        graph, settings, tokenizer=compiled.load_tokenizer(), memory_tokenizer=compiled.load_memory_tokenizer(),
        folder=folder / "train", teacher=teacher,
        seed=recipe.seed, resolved=recipe.resolved(), root=recipe.file.parent,
        cache=run.folder.parent.parent / ".cache" / "tokens",
    )  # fmt: skip
    if _first_process():
        about = {
            "kind": "trained", "model": named(recipe), "recipe": recipe.name, "stage": stage.name,
            "train": {"steps": report.steps, "tokens": report.tokens, "last_loss": report.last_loss},
            "seed": recipe.seed, "versions": versions(),
            "source": compiled.manifest.get("source"), "reports": compiled.manifest.get("reports", []),
        }  # fmt: skip
        texts = {name: (compiled.folder / name).read_text() for name in compiled.manifest["files"] if _carried(name)}
        save(
            folder / "trained", graph, texts=texts, tokenizer=compiled.tokenizer,
            memory_tokenizer=compiled.memory_tokenizer, parent=compiled.digest, about=about,
        )  # fmt: skip
        figures = {"train/loss": report.last_loss, "eval/loss": report.eval_loss, "tokens": report.tokens}
        run.measure(step_name(stage, "trained"), seconds=time.perf_counter() - start, **figures)
    _wait()
    return folder / "trained"


def _expect_to_learn(objective: Any, graph: Any, teacher: Any, line: str) -> None:
    """A student that computes what its teacher does, in training too, has nothing to learn from it alone."""
    import torch

    from graph.lora_sets import TRAINING
    from graph.probe import probe_inputs

    inputs = probe_inputs(teacher, batch=1, length=8)
    mode = {TRAINING: True} if TRAINING in graph.inputs else {}
    with torch.no_grad():
        same = getattr(objective, "alpha", 1.0) == 1.0 and torch.equal(graph(**inputs, **mode), teacher(**inputs))
    if same:
        what = (
            f"{objective.name} has nothing to teach: no pass has changed what the model computes, and it is the teacher"
        )
        fix = "take objective out to learn from the text, or pack the full model with quantize-base in this recipe"
        raise QcError(what, line=line, fix=fix)


def spare_stage(run: Run, stage: Stage, compiled: Path, tell: Tell) -> Path | None:
    """The compiled artifact in the place of a trained one, if ``train.when`` does not hold of it; else None.

    What it compares has been measured: the model as it came, and what was compiled.
    """
    assert stage.train is not None
    least = stage.train.least_increase()
    folder = run.stage(stage.name) / "trained"
    if least is None or (folder / "manifest.json").is_file():
        return None
    known = {m["step"]: m["perplexity"] for m in run.measured() if "perplexity" in m}
    if "start" not in known:
        what = f"{stage_name(stage)}train.when compares with the model as it came, and the recipe begins with several"
        raise QcError(what, fix="set when to null")
    increase = known[step_name(stage, "compiled")] / known["start"] - 1
    verdict = "more than" if increase > least else "not more than"
    tell(f"{stage_name(stage)}perplexity grew by {increase:.2%}, {verdict} {least:.2%}")
    if increase > least:
        return None
    link_tree(compiled, folder)
    tell(f"{stage_name(stage)}not trained: {stage.train.when} does not hold")
    return folder


def _carried(name: str) -> bool:
    return name.startswith("passes/") or name in ("recipe.yaml", "recipe.lock.yaml")


def _first_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _wait() -> None:
    import torch.distributed as distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()


@lru_cache(maxsize=1)
def start_of(model: str, dtype: Any) -> Any:
    """The graph before the passes: the reference of kl, top1 and kd."""
    from graph import capture

    return capture(model, dtype=dtype).materialize()
