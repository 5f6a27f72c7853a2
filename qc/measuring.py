"""Figures of artifacts: perplexity, agreement, sizes; and the gates that hold them to values."""

from __future__ import annotations

import csv
import json
import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graph.artifact import Artifact, load, read_manifest
from graph.checkpoint import open_checkpoint
from graph.errors import QcError
from qc.compiling import stage_name, step_name
from qc.console import GateFailed
from qc.runs import Run, write_text
from qc.training import start_of
from recipes.metrics import COLUMNS
from recipes.schema import Recipe, Stage
from recipes.settings import Gate
from runtimes.data.corpus import Corpus, Split
from runtimes.settings import Data, Embedding, Evaluate, Pooling, Retrieval

if TYPE_CHECKING:
    from runtimes.retrieval import Questions

Tell = Callable[[str], None]


def evaluate_stage(run: Run, recipe: Recipe, stage: Stage, what: str, artifact: Path, tell: Tell) -> dict[str, float]:
    """Measure an artifact as ``evaluate:`` says, once; figures are kept in the run."""
    assert stage.evaluate is not None
    name = step_name(stage, what)
    known = next((m for m in run.measured() if m["step"] == name), {})
    if {"perplexity", "embedding/cosine"} & known.keys():
        return {k: v for k, v in known.items() if isinstance(v, float)}
    loaded = load(artifact, check_hashes=False)
    compare = bool({"kl", "top1", "embedding"} & set(stage.evaluate.metrics))
    reference = _reference(run, recipe, stage, loaded.graph.dtype) if compare else None
    found = measure(
        loaded.graph.materialize(), reference, loaded.load_tokenizer(), recipe, stage.evaluate, run,
        memory_tokenizer=loaded.load_memory_tokenizer(),
    )  # fmt: skip
    bits = bits_per_weight(loaded, *sources(recipe))
    run.measure(name, **found, bits_per_weight=bits, bytes=folder_bytes(artifact), folder=str(artifact))
    tell(f"{stage_name(stage)}{what}: " + ", ".join(f"{k} {v:.4g}" for k, v in found.items()))
    return found


def _reference(run: Run, recipe: Recipe, stage: Stage, dtype: Any) -> Any:
    """What kl and top1 compare with: the model before the passes; of several models, what the stage starts from."""
    if recipe.models is None:
        return start_of(str(recipe.model), dtype)
    stages = {one.name: one for one in recipe.plan()}
    names = list(stages)
    before = stage.start or next((a for a, b in pairwise(names) if b == stage.name), None)
    if before is None:
        what = "kl and top1 compare with the model before the passes, and the recipe has several"
        raise QcError(
            what, line=str(recipe.file), fix="ask for them in a stage behind, where they compare with this one"
        )
    done = "trained" if stages[before].train is not None else "compiled"
    return load(run.stage(before) / done, check_hashes=False).graph.materialize()


def measure(
    graph: Any,
    reference: Any,
    tokenizer: Any,
    recipe: Recipe,
    wanted: Evaluate,
    run: Run,
    *,
    memory_tokenizer: Any = None,
) -> dict[str, float]:
    """Perplexity, agreement with ``reference`` where there is one, and what is looked up, on held-out data."""
    from runtimes.embeddings import compare
    from runtimes.evaluate import evaluate
    from runtimes.retrieval.recall import recall

    batches = held_out_batches(
        recipe, wanted, tokenizer, run.folder.parent.parent / ".cache" / "tokens", memory_tokenizer
    )
    if "embedding" in wanted.metrics:
        return {} if reference is None else compare(graph, reference, batches, pooling_of(recipe))
    compared: list[Any] = [m for m in wanted.metrics if m in ("kl", "top1") and reference is not None]
    found = dict(evaluate(graph, batches, reference=reference, metrics=["perplexity", *compared]))
    if "retrieval" in wanted.metrics:
        asked = questions_on(data_of(recipe, wanted), wanted, tokenizer, memory_tokenizer)
        found |= recall(graph, asked, batches=wanted.batches, batch=wanted.batch, greedy=wanted.greedy)
    return found


def pooling_of(recipe: Recipe) -> Pooling:
    """How the recipe pools where it trains on it; else by the mean."""
    objectives = (stage.train.objective for stage in recipe.plan() if stage.train is not None)
    return next((one.pooling for one in objectives if isinstance(one, Embedding)), "mean")


def data_of(recipe: Recipe, wanted: Evaluate) -> Data:
    """What is evaluated on: the data of the evaluation, or that which the training is evaluated on."""
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
    return data


def questions_on(data: Data, wanted: Evaluate, tokenizer: Any, memory_tokenizer: Any) -> Questions:
    """The held-out questions of an evaluation; without a tokenizer of its own, chunks are read with the other one."""
    from runtimes.retrieval import Questions

    assert isinstance(data, Retrieval), "a recipe that asks for retrieval has questions"
    read: dict[str, Any] = {"tokenizer": tokenizer, "memory_tokenizer": memory_tokenizer or tokenizer}
    return Questions(data, "heldout", length=wanted.length, **read)


def held_out_batches(
    recipe: Recipe, wanted: Evaluate, tokenizer: Any, cache: Path, memory_tokenizer: Any = None
) -> Any:
    """The batches of an evaluation: its own data, or what training evaluates on, never what it trains on."""
    trained = next((s.train for s in recipe.plan() if s.train is not None), None)
    data = data_of(recipe, wanted)
    if isinstance(data, Retrieval):
        asked = questions_on(data, wanted, tokenizer, memory_tokenizer)
        yield from (asked.batch(range(at * wanted.batch, (at + 1) * wanted.batch)) for at in range(wanted.batches))
        return
    split: Split = "all" if trained is not None and wanted.data is None and trained.eval_data is not None else "heldout"
    tokens = wanted.batches * wanted.batch * wanted.length
    tokens = min(tokens, wanted.tokens) if wanted.tokens else tokens
    corpus = _corpus(data, recipe.file.parent)
    packing = "embedding" not in wanted.metrics  # whose rows are texts
    rows = corpus.rows(
        split, tokenizer=tokenizer, length=wanted.length, cache=cache, packing=packing, seed=0, enough=tokens
    )
    for start in range(0, min(len(rows), tokens // wanted.length), wanted.batch):
        yield rows.batch(list(range(start, min(start + wanted.batch, len(rows), tokens // wanted.length))))


def sources(recipe: Recipe) -> list[str]:
    """The models that the recipe begins with."""
    return [one.model for one in recipe.models.values()] if recipe.models else [str(recipe.model)]


def bits_per_weight(artifact: Artifact, *models: str) -> float:
    """Stored bits of all tensors of an artifact, over the number of weights in the checkpoints it was made of."""
    return 8 * folder_bytes(artifact.folder) / sum(weights_of(model) for model in models)


def weights_of(model: str) -> int:
    """The number of weights in a checkpoint; a tied one counts once."""
    checkpoint = open_checkpoint(model, packed=True)
    beside = [stored.shape for key, stored in checkpoint.tensors.items() if not _is_of_packed(key, checkpoint.packed)]
    return sum(map(math.prod, [*beside, *(held.shape for held in checkpoint.packed.values())]))


def _is_of_packed(key: str, packed: Mapping[str, Any]) -> bool:
    """Whether a tensor of a checkpoint is a scale or the like of a packed weight, or its codes; biases are not."""
    module = key.partition(".weight.")[0] if ".weight." in key else key.rpartition(".")[0]
    return f"{module}.weight" in packed and not key.endswith(".bias")


@lru_cache(maxsize=4)
def _corpus(data: Data, root: Path) -> Corpus:
    return Corpus(data, root)


def folder_bytes(folder: Path) -> int:
    """The bytes of all weight files in a folder, those of Core ML packages too."""
    return sum(p.stat().st_size for kind in ("*.safetensors", "*.mlpackage/**/*.bin") for p in folder.glob(kind))


def check_gates(run: Run, stage: Stage, gates: Sequence[Gate], artifact: Path, tell: Tell) -> None:
    """Raise GateFailed, with every one of the ``gates`` that does not hold for a stage and its artifact."""
    figures = _figures(run, stage, artifact, {gate.metric for gate in gates})
    failed, told = [], []
    series = run.stage(stage.name) / "train" / "metrics.csv"
    for gate in gates:
        held, why = _holds(gate, figures, series)
        told.append(asdict(gate) | {"held": held, "why": why} | _ends(gate, _series(gate, series)))
        tell(
            f"{stage_name(stage)}gate {gate.metric} {gate.op} {'' if gate.value is None else f'{gate.value:g}'}: {why}"
        )
        if not held:
            failed.append(f"{gate.metric} {gate.op} {'' if gate.value is None else f'{gate.value:g} '}fails: {why}")
    if told:
        known = _gates_before(run.stage(stage.name) / "gates.json", [gate.metric for gate in gates])
        write_text(run.stage(stage.name) / "gates.json", json.dumps([*known, *told], indent=1) + "\n")
    if failed:
        raise GateFailed("; ".join(failed), fix="see measured.json in the run's folder; change the recipe, or the gate")


def _gates_before(path: Path, metrics: Collection[str]) -> list[dict[str, Any]]:
    """What ``gates.json`` tells of gates on other metrics."""
    told: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
    return [one for one in told if one["metric"] not in metrics]


def _ends(gate: Gate, values: Sequence[float]) -> dict[str, float | None]:
    """How a series began, how it ended, and how many of its values are finite; nothing stands for what is no number."""
    if not values:
        return {}
    window = min(gate.window or 10, max(1, len(values) // 2))
    ends = {"first": sum(values[:window]) / window, "last": sum(values[-window:]) / window}
    told: dict[str, float | None] = {key: value if math.isfinite(value) else None for key, value in ends.items()}
    return {"steps": len(values), **told, "finite": sum(math.isfinite(value) for value in values)}


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
        found["bits_per_weight"] = bits_per_weight(load(artifact, check_hashes=False), *sources(run.recipe()))
    return found


def _holds(gate: Gate, figures: dict[str, float], series: Path) -> tuple[bool, str]:
    values = _series(gate, series)
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


def _series(gate: Gate, series: Path) -> list[float]:
    """The values of a metric of a training, step by step."""
    column = COLUMNS.get(gate.metric)
    if not column or not series.is_file():
        return []
    with open(series, newline="") as file:
        return [float(row[column]) for row in csv.DictReader(file) if row.get(column)]
