"""Compiling a stage of a recipe: capture or load, run the passes, write the artifact."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from graph.apart import Share, sharing
from graph.errors import QcError, QcErrors
from qc.models import DTYPES as DTYPES
from qc.models import ONLY, Workshop, capture_all, models_of, named, source_of, tokenizers
from qc.reading import Reader, text_reader
from qc.runs import Run, code_digest, link_tree, texts, write_text
from qc.together import Part, Watch, parts_of, together
from recipes.schema import PassStep, Recipe, Stage
from recipes.settings import Export

Tell = Callable[[str], None]


def compile_stage(
    run: Run,
    recipe: Recipe,
    stage: Stage,
    parent: Path | None,
    *,
    check: bool = True,
    tell: Tell = print,
    processes: int = 1,
) -> Path:
    """The folder of the compiled artifact of ``stage``, which starts from the model or from the artifact ``parent``.

    What has been compiled before from the same content is taken as it is. Work on weights is divided among so many
    ``processes``, or those that ``accelerate launch`` started; the first of them writes.
    """
    folder = run.stage(stage.name) / "compiled"
    if (folder / "manifest.json").is_file():
        tell(f"{stage_name(stage)}compiled before: {folder}")
        return folder
    from graph.artifact import save

    key = _key(recipe, stage, parent)
    index = run.folder.parent.parent / ".cache" / f"{key}.txt"
    if index.is_file() and (known := Path(index.read_text().strip())).joinpath("manifest.json").is_file():
        link_tree(known, folder)
        tell(f"{stage_name(stage)}compiled before: {known}")
        return folder
    start = time.perf_counter()
    part = Part(str(run.folder), stage.name, None if parent is None else str(parent), check)
    with together(processes, part, folder, parts_of(index)) as writes:
        made = _compiled(recipe, stage, parent, check, tell, index.parent / "tokens")
        if writes:
            save(folder, **made)
    if not writes:
        return folder
    index.parent.mkdir(parents=True, exist_ok=True)
    write_text(index, f"{folder.resolve()}\n")
    run.measure(step_name(stage, "compiled"), seconds=time.perf_counter() - start)
    return folder


def stage_name(stage: Stage) -> str:
    """``adapt: `` in front of messages, nothing for a recipe without stages."""
    return "" if stage.name == "main" else f"{stage.name}: "


def step_name(stage: Stage, what: str) -> str:
    """``tune/trained``; a recipe without stages has no stage to name."""
    return what if stage.name == "main" else f"{stage.name}/{what}"


def _key(recipe: Recipe, stage: Stage, parent: Path | None) -> str:
    resolved = recipe.resolved()
    passes = (
        resolved["passes"]
        if not recipe.stages
        else next(s["passes"] for s in resolved["stages"] if s["name"] == stage.name)
    )
    source = (
        source_of(recipe) if parent is None else hashlib.sha256((parent / "manifest.json").read_bytes()).hexdigest()
    )
    content = [passes, recipe.dtype, recipe.seed, source, code_digest(), *texts(recipe, [stage])]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


def help_stage(part: Part, rank: int, count: int, watch: Watch) -> None:
    """Do the share of helper number ``rank`` in compiling a stage; nothing is written but what others read of it."""
    run = Run(Path(part.run))
    recipe = run.recipe()
    stage = next(stage for stage in recipe.plan() if stage.name == part.stage)
    parent = None if part.parent is None else Path(part.parent)
    index = run.folder.parent.parent / ".cache" / f"{_key(recipe, stage, parent)}.txt"
    with sharing(Share(parts_of(index), rank, count, watch)):
        _compiled(recipe, stage, parent, part.check, lambda message: None, index.parent / "tokens")


def _compiled(
    recipe: Recipe, stage: Stage, parent: Path | None, check: bool, tell: Tell, texts_in: Path
) -> dict[str, Any]:
    """What ``save`` writes of a stage."""
    import qc
    from graph.artifact import load
    from graph.tokenizer import load_tokenizer
    from recipes.lock import text as lock_text

    memory_tokenizer: Path | None
    if parent is None:
        workshop, (tokenizer, memory_tokenizer), parent_digest = Workshop(capture_all(recipe)), tokenizers(recipe), None
        for name, graph in workshop.graphs.items():
            model = f"{name} " if name else ""
            tell(f"{stage_name(stage)}captured {model}{_model(recipe, name)}: {_size(graph)}")
    else:
        artifact = load(parent)
        workshop, parent_digest = Workshop({ONLY: artifact.graph}), artifact.digest
        tokenizer, memory_tokenizer = artifact.tokenizer or parent, artifact.memory_tokenizer
    written = {
        "recipe.yaml": recipe.file.read_text(),
        "recipe.lock.yaml": lock_text(recipe),
        "passes/00-start.txt": str(workshop),
    }
    read = text_reader(recipe, texts_in, lambda: load_tokenizer(tokenizer, named(recipe)))
    reports = _rewrite(workshop, recipe, stage, read, check, tell, written)
    about = {
        "kind": "compiled", "model": named(recipe), "recipe": recipe.name, "stage": stage.name, "reports": reports,
        "versions": versions(), "qc": qc.__version__, "seed": recipe.seed, "source": source_of(recipe),
    }  # fmt: skip
    return {
        "graph": workshop.graph, "texts": written, "tokenizer": tokenizer, "memory_tokenizer": memory_tokenizer,
        "parent": parent_digest, "about": about,
    }  # fmt: skip


def _model(recipe: Recipe, name: str) -> str:
    return recipe.models[name].model if recipe.models else str(recipe.model)


def _size(graph: Any) -> str:
    return f"{len(graph.sites())} ops, {graph.blocks} blocks"


def _rewrite(
    workshop: Workshop, recipe: Recipe, stage: Stage, read: Reader, check: bool, tell: Tell, texts: dict[str, str]
) -> list[dict[str, Any]]:
    """Run the passes of a stage; their reports. The graphs behind each go into ``texts``."""
    import torch

    from passes.runner import apply, link

    reports = []
    sizes = {"batch": recipe.probe.batch, "length": recipe.probe.length}

    folders = {name: one.model for name, one in models_of(recipe).items()}

    def ready(step: PassStep) -> Any:
        return step.step.reading(read).knowing(folders)

    def rewrite(step: PassStep, graph: Any) -> Any:
        torch.manual_seed(recipe.seed)
        return run_step(step, lambda s: apply(ready(s), graph, check=check, line=s.line, **sizes))

    def join(step: PassStep, graphs: Any) -> Any:
        return run_step(step, lambda s: link(s.step, graphs, check=check, line=s.line, **sizes))

    for number, step in enumerate(stage.passes, 1):
        start = time.perf_counter()
        for name, report in workshop.do(step, rewrite, join).items():
            entry = {"pass": step.kind, "name": step.name, **({"on": name} if name else {})}
            reports.append({**entry, "seconds": round(time.perf_counter() - start, 3), **asdict(report)})
            label = f"{step.name} on {name}" if name else step.name
            tell(f"{stage_name(stage)}{label}: {len(report.changed)} sites{_figures(report.figures)}")
        texts[f"passes/{number:02}-{step.name}.txt"] = str(workshop)
    return reports


def run_step(step: PassStep, action: Callable[[PassStep], Any]) -> Any:
    """Do ``action``; a QcError on the way learns where in the recipe the pass and its options are."""
    try:
        return action(step)
    except QcErrors as errors:
        for error in errors.errors:
            error.line = step.line_of(error)
        raise
    except QcError as error:
        error.line = step.line_of(error)
        raise


def _figures(figures: dict[str, Any]) -> str:
    shown = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in list(figures.items())[:4]]
    return f" ({', '.join(shown)})" if shown else ""


def versions() -> dict[str, str]:
    """The versions of what had a hand in an artifact."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "transformers", "bitsandbytes", "peft", "accelerate", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _dry_run(workshop: Workshop, step: PassStep, folders: dict[str, str]) -> None:
    from passes.runner import apply, link

    workshop.do(
        step,
        lambda s, graph: run_step(s, lambda one: apply(one.step.knowing(folders), graph, check=False, line=one.line)),
        lambda s, graphs: run_step(s, lambda one: link(one.step, graphs, check=False, line=one.line)),
    )


def plan(recipe: Recipe, until: str | None = None, server: str | None = None) -> tuple[Any, list[QcError]]:
    """The graph that a recipe would give, without weights, and all mistakes that shapes show. Nothing is computed.

    ``until`` is the last stage to take part; without it, all do. ``server`` is one that shall load the exports.
    """
    from runtimes.export import obstacles

    errors: list[QcError] = []
    stages = _stages(recipe, until)
    workshop, folders = Workshop(capture_all(recipe, plan=True)), {n: m.model for n, m in models_of(recipe).items()}
    done: dict[str, Workshop] = {}
    for stage in stages:
        workshop = workshop if stage.start is None else done[stage.start].copy()
        for step in stage.passes:
            before = workshop.copy()
            try:
                _dry_run(workshop, step, folders)
            except QcErrors as found:
                errors += found.errors
                workshop = before
            except QcError as error:
                errors.append(error)
                workshop = before
        if any(later.start == stage.name for later in stages):
            done[stage.name] = workshop.copy()
        if len(workshop.graphs) > 1 and errors:
            break  # what should have joined them is among the mistakes
        for wanted in stage.export:
            errors += obstacles(wanted.target, workshop.graph, wanted.numbers, wanted.options())
            errors += _refused(server, workshop.graph, wanted) if server is not None else ()
    if server is not None:
        errors += _unserved(server, recipe)
    return next(iter(workshop.graphs.values())) if errors else workshop.graph, errors


def _refused(server: str, graph: Any, wanted: Export) -> list[QcError]:
    """Why a server would not load an export; of dense floats there is nothing to say."""
    from runtimes.serving.settings import TARGETS

    if wanted.target not in TARGETS:
        return []
    from runtimes.export._serving import settings_of
    from runtimes.serving.rules import refusals

    options = {key: value for key, value in wanted.options().items() if key != "calibration"}
    return list(refusals(server, graph, settings_of(wanted.target, **options)))


def _unserved(server: str, recipe: Recipe) -> list[QcError]:
    """Raises QcError for a server that is not known; an error where nothing is exported that it could load."""
    from runtimes.serving.rules import load_server

    title = load_server(server).title
    if any(wanted.target != "ane" for stage in recipe.plan() for wanted in stage.export):
        return []
    return [QcError(f"the recipe exports nothing that {title} loads", fix="add export: [{target: fp8}]")]


def _stages(recipe: Recipe, until: str | None) -> tuple[Stage, ...]:
    names = [stage.name for stage in recipe.plan()]
    if until is not None and until not in names:
        raise QcError(f"{recipe.file.name} has no stage {until!r}", fix=f"its stages are {', '.join(names)}")
    return recipe.plan()[: None if until is None else names.index(until) + 1]
