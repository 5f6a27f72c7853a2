"""Figures of artifacts: perplexity, agreement, sizes; and the gates that hold them to values."""

from __future__ import annotations

import csv
import math
import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from graph.artifact import Artifact, load, read_manifest
from graph.checkpoint import open_checkpoint
from graph.errors import QcError
from qc.compiling import stage_name, step_name
from qc.console import GateFailed
from qc.runs import Run
from qc.training import start_of
from recipes.schema import Recipe, Stage
from recipes.settings import Gate
from runtimes.data.corpus import Corpus, Split
from runtimes.settings import Data, Evaluate, PythonStdlib, TextFiles

Tell = Callable[[str], None]


def evaluate_stage(run: Run, recipe: Recipe, stage: Stage, what: str, artifact: Path, tell: Tell) -> dict[str, float]:
    """Measure an artifact as ``evaluate:`` says, once; figures are kept in the run."""
    assert stage.evaluate is not None
    name = step_name(stage, what)
    known = next((m for m in run.measured() if m["step"] == name), {})
    if "perplexity" in known:
        return {k: v for k, v in known.items() if isinstance(v, float)}
    loaded = load(artifact, check_hashes=False)
    compare = bool({"kl", "top1"} & set(stage.evaluate.metrics))
    reference = start_of(str(recipe.model), loaded.graph.dtype) if compare else None
    found = measure(loaded.graph.materialize(), reference, loaded.load_tokenizer(), recipe, stage.evaluate, run)
    bits = bits_per_weight(loaded, str(recipe.model))
    run.measure(name, **found, bits_per_weight=bits, bytes=folder_bytes(artifact), folder=str(artifact))
    tell(f"{stage_name(stage)}{what}: " + ", ".join(f"{k} {v:.4g}" for k, v in found.items()))
    return found


def measure(graph: Any, reference: Any, tokenizer: Any, recipe: Recipe, wanted: Evaluate, run: Run) -> dict[str, float]:
    """Perplexity, and agreement with ``reference`` where there is one, on held-out text."""
    from runtimes.evaluate import evaluate

    batches = held_out_batches(recipe, wanted, tokenizer, run.folder.parent.parent / ".cache" / "tokens")
    metrics = [m for m in wanted.metrics if reference is not None or m == "perplexity"]
    return dict(evaluate(graph, batches, reference=reference, metrics=metrics))


def held_out_batches(recipe: Recipe, wanted: Evaluate, tokenizer: Any, cache: Path) -> Any:
    """The batches of an evaluation: its own data, or what training evaluates on, never what it trains on."""
    trained = next((s.train for s in recipe.plan() if s.train is not None), None)
    data: Data | None = wanted.data
    if data is None and trained is not None:
        data = trained.eval_data or trained.data or (recipe.cache.data if recipe.cache is not None else None)
    if data is None:
        raise QcError(
            "evaluate has no data",
            line=str(recipe.file),
            fix="say data: python-stdlib (or text:, jsonl:, hf:) in evaluate",
        )
    split: Split = "all" if trained is not None and wanted.data is None and trained.eval_data is not None else "heldout"
    tokens = wanted.batches * wanted.batch * wanted.length
    tokens = min(tokens, wanted.tokens) if wanted.tokens else tokens
    corpus = _corpus(data, recipe.file.parent)
    rows = corpus.rows(split, tokenizer=tokenizer, length=wanted.length, cache=cache, seed=0, enough=tokens)
    for start in range(0, min(len(rows), tokens // wanted.length), wanted.batch):
        yield rows.batch(list(range(start, min(start + wanted.batch, len(rows), tokens // wanted.length))))


def bits_per_weight(artifact: Artifact, model: str) -> float:
    """Stored bits of all tensors of an artifact, over the number of weights in the checkpoint it was made of."""
    return 8 * folder_bytes(artifact.folder) / weights_of(model)


def weights_of(model: str) -> int:
    """The number of weights in a checkpoint; a tied one counts once."""
    return sum(math.prod(stored.shape) for stored in open_checkpoint(model).tensors.values())


@lru_cache(maxsize=4)
def _corpus(data: Data, root: Path) -> Corpus:
    return Corpus(data, root)


def folder_bytes(folder: Path) -> int:
    """The bytes of all weight files in a folder, those of Core ML packages too."""
    return sum(p.stat().st_size for kind in ("*.safetensors", "*.mlpackage/**/*.bin") for p in folder.glob(kind))


def check_gates(run: Run, stage: Stage, gates: Sequence[Gate], artifact: Path, tell: Tell) -> None:
    """Raise GateFailed, with every one of the ``gates`` that does not hold for a stage and its artifact."""
    figures = _figures(run, stage, artifact, {gate.metric for gate in gates})
    failed = []
    for gate in gates:
        held, why = _holds(gate, figures, run.stage(stage.name) / "train" / "metrics.csv")
        tell(
            f"{stage_name(stage)}gate {gate.metric} {gate.op} {'' if gate.value is None else f'{gate.value:g}'}: {why}"
        )
        if not held:
            failed.append(f"{gate.metric} {gate.op} {'' if gate.value is None else f'{gate.value:g} '}fails: {why}")
    if failed:
        raise GateFailed("; ".join(failed), fix="see measured.json in the run's folder; change the recipe, or the gate")


def _figures(run: Run, stage: Stage, artifact: Path, wanted: Collection[str]) -> dict[str, float]:
    manifest = read_manifest(artifact)
    found = {k: float(v) for r in manifest["reports"] for k, v in r["figures"].items() if k in wanted}
    for entry in run.measured():
        if entry["step"].startswith(step_name(stage, "")):
            found |= {k: float(v) for k, v in entry.items() if isinstance(v, (int, float))}
    start = next((e.get("perplexity") for e in run.measured() if e["step"] == "start"), None)
    if start and "perplexity" in found:
        found["perplexity_ratio"] = found["perplexity"] / float(start)
    if "bytes" in wanted:
        found["bytes"] = folder_bytes(artifact)
    if "bits_per_weight" in wanted:
        found["bits_per_weight"] = bits_per_weight(load(artifact, check_hashes=False), str(manifest["model"]))
    return found


def _holds(gate: Gate, figures: dict[str, float], series: Path) -> tuple[bool, str]:
    column = {"train/loss": "loss", "train/grad_norm": "grad_norm", "eval/loss": "eval_loss"}.get(gate.metric)
    values: list[float] = []
    if column and series.is_file():
        with open(series, newline="") as file:
            values = [float(row[column]) for row in csv.DictReader(file) if row.get(column)]
    if gate.op == "finite":
        bad = [v for v in values or [figures.get(gate.metric, math.nan)] if not math.isfinite(v)]
        return not bad, "all finite" if not bad else f"{len(bad)} values are not"
    if gate.op == "decreased":
        window = min(gate.window or 10, max(1, len(values) // 2))
        if len(values) < 2:
            return False, "there are not two values"
        first, last = sum(values[:window]) / window, sum(values[-window:]) / window
        return last < first, f"from {first:.4g} to {last:.4g}"
    value = figures.get(gate.metric, values[-1] if values else math.nan)
    compare = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq}[gate.op]
    assert gate.value is not None
    return bool(compare(value, gate.value)), f"it is {value:.4g}"


def evaluate_artifact(
    folder: Path, reference: str | None, data: str | None, batches: int, batch: int, length: int, runs: Path
) -> dict[str, float]:
    """``qc eval``: an artifact against a reference, a model folder or artifact; without one, the model it came from."""
    from graph import capture
    from runtimes.evaluate import evaluate

    loaded = load(folder)
    given = None if data is None else source_of(data)
    recipe, wanted = text_of(folder, loaded, Evaluate(data=given, batches=batches, batch=batch, length=length))
    against = reference or str(loaded.manifest["model"])
    if (Path(against) / "manifest.json").is_file():
        other = load(Path(against)).graph.materialize()
    else:
        other = capture(against, dtype=loaded.graph.dtype).materialize()
    tokens = held_out_batches(recipe, wanted, loaded.load_tokenizer(), runs / ".cache" / "tokens")
    found = evaluate(loaded.graph.materialize(), tokens, reference=other, metrics=["perplexity", "kl", "top1"])
    return dict(found) | {
        "bits_per_weight": bits_per_weight(loaded, str(loaded.manifest["model"])),
        "bytes": float(folder_bytes(folder)),
    }


def text_of(folder: Path, loaded: Artifact, wanted: Evaluate) -> tuple[Recipe, Evaluate]:
    """The recipe whose text an artifact is measured on, and what to measure on: the given data, or the recipe's."""
    from recipes.load import load as load_recipe

    near = next((p for p in folder.resolve().parents if (p / "run.json").is_file()), None)
    recipe = Run(near).recipe() if near is not None else load_recipe("fp16", [f"model={loaded.manifest['model']}"])
    if wanted.data is not None:
        return recipe, wanted
    if near is None or not any(s.train or s.evaluate for s in recipe.plan()):
        return recipe, replace(wanted, data=PythonStdlib())
    said = next((s.evaluate for s in reversed(recipe.plan()) if s.evaluate and s.evaluate.data), None)
    return recipe, replace(wanted, data=said.data if said else None)


def source_of(text: str) -> Data:
    """What ``--data`` says."""
    return PythonStdlib() if text == "python-stdlib" else TextFiles(text=text)
