"""``qc eval``: figures of an artifact as it lies there, on text or on questions that are held out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from graph import Graph
from graph.artifact import Artifact, load
from graph.errors import QcError
from graph.joint import is_joint
from qc.measuring import bits_per_weight, data_of, folder_bytes, held_out_batches, pooling_of, questions_on, sources
from qc.runs import run_around
from recipes.schema import Recipe
from runtimes.settings import Data, Evaluate, PythonStdlib, Retrieval, TextFiles


def evaluate_artifact(
    folder: Path, reference: str | None, data: str | None, batches: int, batch: int, length: int, runs: Path
) -> dict[str, float]:
    """An artifact against a reference, a model folder or artifact; without one, the model it came from.

    An artifact of two models came from no single one: it is compared with a reference only where one is given, and
    asked the questions of its recipe.
    """
    from runtimes.embeddings import compare
    from runtimes.evaluate import evaluate
    from runtimes.retrieval.recall import recall

    loaded = load(folder)
    given = None if data is None else source_of(data)
    recipe, wanted = text_of(folder, loaded, Evaluate(data=given, batches=batches, batch=batch, length=length))
    other = _reference(loaded, reference)
    tokenizers = (loaded.load_tokenizer(), loaded.load_memory_tokenizer())
    graph = loaded.graph.materialize()
    wanted = for_kind(wanted, graph)
    held_out = held_out_batches(recipe, wanted, tokenizers[0], runs / ".cache" / "tokens", tokenizers[1])
    sizes = {"bytes": float(folder_bytes(folder))}
    if graph.kind == "encoder":
        bits = bits_per_weight(loaded, str(loaded.manifest["model"]))
        return compare(graph, other, held_out, pooling_of(recipe)) | {"bits_per_weight": bits} | sizes
    compared: list[Any] = ["kl", "top1"] if other is not None else []
    found = dict(evaluate(graph, held_out, reference=other, metrics=["perplexity", *compared]))
    asked = data_of(recipe, wanted)
    if isinstance(asked, Retrieval):
        found |= recall(graph, questions_on(asked, wanted, *tokenizers), batches=batches, batch=batch)
    models = sources(recipe) if is_joint(graph) else [str(loaded.manifest["model"])]
    return found | {"bits_per_weight": bits_per_weight(loaded, *models)} | sizes


def for_kind(wanted: Evaluate, graph: Graph) -> Evaluate:
    """The same evaluation, of vectors where the model is an encoder: each row is then a text."""
    return replace(wanted, metrics=("embedding",)) if graph.kind == "encoder" else wanted


def _reference(loaded: Artifact, reference: str | None) -> Any:
    """What is compared with; nothing for several models where nothing is given."""
    from graph import capture

    if reference is None and is_joint(loaded.graph):
        return None
    against = reference or str(loaded.manifest["model"])
    if (Path(against) / "manifest.json").is_file():
        return load(Path(against)).graph.materialize()
    if is_joint(loaded.graph):
        what = f"{against} is a model, and {loaded.folder} is made of two"
        raise QcError(what, fix="give another artifact of the recipe as the reference")
    return capture(against, dtype=loaded.graph.dtype).materialize()


def text_of(folder: Path, loaded: Artifact, wanted: Evaluate) -> tuple[Recipe, Evaluate]:
    """The recipe whose text an artifact is measured on, and what to measure on: the given data, or the recipe's."""
    from recipes.load import load as load_recipe

    run = run_around(folder)
    if run is None and is_joint(loaded.graph):
        what = f"{folder} lies in no run, and without its recipe nobody knows what it is to be asked"
        raise QcError(what, fix="give the artifact in the folder of its run")
    recipe = run.recipe() if run is not None else load_recipe("fp16", [f"model={loaded.manifest['model']}"])
    if wanted.data is not None:
        return recipe, wanted
    if run is None or not any(s.train or s.evaluate for s in recipe.plan()):
        return recipe, replace(wanted, data=PythonStdlib())
    said = next((s.evaluate for s in reversed(recipe.plan()) if s.evaluate and s.evaluate.data), None)
    return recipe, replace(wanted, data=said.data if said else None)


def source_of(text: str) -> Data:
    """What ``--data`` says."""
    return PythonStdlib() if text == "python-stdlib" else TextFiles(text=text)
