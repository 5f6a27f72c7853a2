"""Compiling a stage of a recipe: capture or load, run the passes, write the artifact."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from graph.errors import QcError, QcErrors
from qc.runs import Run, code_digest, identity, link_tree, texts, write_text
from recipes.schema import PassStep, Recipe, Stage
from recipes.settings import Export

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

Tell = Callable[[str], None]

Reader = Callable[..., Iterator[dict[str, Any]]]


def compile_stage(
    run: Run, recipe: Recipe, stage: Stage, parent: Path | None, *, check: bool = True, tell: Tell = print
) -> Path:
    """The folder of the compiled artifact of ``stage``, which starts from the model or from the artifact ``parent``.

    What has been compiled before from the same content is taken as it is.
    """
    folder = run.stage(stage.name) / "compiled"
    if (folder / "manifest.json").is_file():
        tell(f"{stage_name(stage)}compiled before: {folder}")
        return folder
    key = _key(recipe, stage, parent)
    index = run.folder.parent.parent / ".cache" / f"{key}.txt"
    if index.is_file() and (known := Path(index.read_text().strip())).joinpath("manifest.json").is_file():
        link_tree(known, folder)
        tell(f"{stage_name(stage)}compiled before: {known}")
        return folder
    start = time.perf_counter()
    _compile(folder, recipe, stage, parent, check, tell, index.parent / "tokens")
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
        identity(str(recipe.model))
        if parent is None
        else hashlib.sha256((parent / "manifest.json").read_bytes()).hexdigest()
    )
    content = [passes, recipe.dtype, recipe.seed, source, code_digest(), *texts(recipe, [stage])]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


def _compile(
    folder: Path, recipe: Recipe, stage: Stage, parent: Path | None, check: bool, tell: Tell, texts_in: Path
) -> None:
    import torch

    import qc
    from graph import capture
    from graph.artifact import load, load_tokenizer, save
    from graph.checkpoint import locate
    from recipes.lock import text as lock_text

    _expect_one_model(recipe)
    if parent is None:
        graph, tokenizer, parent_digest = (
            capture(str(recipe.model), dtype=getattr(torch, DTYPES[recipe.dtype])),
            locate(str(recipe.model)),
            None,
        )
        tell(f"{stage_name(stage)}captured {recipe.model}: {len(graph.sites())} ops, {graph.blocks} blocks")
    else:
        artifact = load(parent)
        graph, tokenizer, parent_digest = artifact.graph, artifact.tokenizer or parent, artifact.digest
    written = {
        "recipe.yaml": recipe.file.read_text(),
        "recipe.lock.yaml": lock_text(recipe),
        "passes/00-start.txt": f"{graph}\n",
    }
    read = text_reader(recipe, texts_in, lambda: load_tokenizer(tokenizer, str(recipe.model)))
    reports = _rewrite(graph, recipe, stage, read, check, tell, written)
    about = {
        "kind": "compiled", "model": str(recipe.model), "recipe": recipe.name, "stage": stage.name, "reports": reports,
        "versions": versions(), "qc": qc.__version__, "seed": recipe.seed, "source": identity(str(recipe.model)),
    }  # fmt: skip
    save(folder, graph, texts=written, tokenizer=tokenizer, parent=parent_digest, about=about)


def _rewrite(
    graph: Any, recipe: Recipe, stage: Stage, read: Reader, check: bool, tell: Tell, texts: dict[str, str]
) -> list[dict[str, Any]]:
    """Run the passes of a stage; their reports. The graph behind each goes into ``texts``."""
    import torch

    from passes.runner import apply

    reports = []
    sizes = {"batch": recipe.probe.batch, "length": recipe.probe.length}
    for number, step in enumerate(stage.passes, 1):
        torch.manual_seed(recipe.seed)
        start = time.perf_counter()
        report = run_step(step, lambda s: apply(s.step.reading(read), graph, check=check, line=s.line, **sizes))
        reports.append(
            {"pass": step.kind, "name": step.name, "seconds": round(time.perf_counter() - start, 3), **asdict(report)}
        )
        texts[f"passes/{number:02}-{step.name}.txt"] = f"{graph}\n"
        tell(f"{stage_name(stage)}{step.name}: {len(report.changed)} sites{_figures(report.figures)}")
    return reports


def text_reader(recipe: Recipe, cache: Path, tokenizer: Callable[[], Any]) -> Reader:
    """Batches of the text that a pass asks for, of documents that are trained on, never of those held out."""

    def read(data: Any, tokens: int, length: int, batch: int) -> Iterator[dict[str, Any]]:
        from runtimes.data.corpus import Corpus

        corpus = Corpus(data, recipe.file.parent)
        same: dict[str, Any] = {"tokenizer": tokenizer(), "length": length, "cache": cache, "seed": recipe.seed}
        rows = corpus.rows("train", enough=tokens, **same)
        wanted = range(min(len(rows), -(-tokens // length)))
        for start in wanted[::batch]:
            found = rows.batch(wanted[start : start + batch])
            yield {"input_ids": found.input_ids, "attention_mask": found.attention_mask}

    return read


def _expect_one_model(recipe: Recipe) -> None:
    if recipe.models is not None:
        raise QcError("a recipe of several models cannot be compiled yet", line=str(recipe.file), fix="give one model:")


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


def _dry(graph: Any) -> Callable[[PassStep], Any]:
    from passes.runner import apply

    return lambda step: apply(step.step, graph, check=False, line=step.line)


def plan(recipe: Recipe, until: str | None = None, server: str | None = None) -> tuple[Any, list[QcError]]:
    """The graph that a recipe would give, without weights, and all mistakes that shapes show. Nothing is computed.

    ``until`` is the last stage to take part; without it, all do. ``server`` is one that shall load the exports.
    """
    import torch

    from graph import capture
    from graph.checkpoint import locate, open_checkpoint, read_config, weight_files
    from runtimes.export import obstacles

    _expect_one_model(recipe)
    errors: list[QcError] = []
    stages = _stages(recipe, until)
    folder = locate(str(recipe.model))
    dtype = getattr(torch, DTYPES[recipe.dtype])
    has_weights = any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
    if has_weights:
        weight_files(folder)
        open_checkpoint(str(folder))
    graph = capture(read_config(folder), dtype=dtype)
    for stage in stages:
        for step in stage.passes:
            before = graph.copy()
            try:
                run_step(step, _dry(graph))
            except QcErrors as found:
                errors += found.errors
                graph = before
            except QcError as error:
                errors.append(error)
                graph = before
        for wanted in stage.export:
            errors += obstacles(wanted.target, graph, wanted.numbers, wanted.options())
            errors += _refused(server, graph, wanted) if server is not None else ()
    if server is not None:
        errors += _unserved(server, recipe)
    return graph, errors


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
