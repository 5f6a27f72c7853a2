"""``qc quality``: what compression did, weight by weight and on text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from graph import Graph
from graph.artifact import load
from qc.console import table
from qc.evaluating import for_kind, text_of
from qc.measuring import held_out_batches, pooling_of
from qc.training import start_of
from runtimes.data import Batch
from runtimes.settings import Data, Evaluate, Pooling

Finding = dict[str, Any]


def judge_artifact(folder: Path, data: Data | None, batches: int, batch: int, length: int, runs: Path) -> Finding:
    """The worst weights, both perplexities and a verdict; all of it goes into ``quality`` beside the artifact."""
    from runtimes.assess.profile import WORST, draw, profile

    loaded = load(folder)
    graph = loaded.graph.materialize()
    model = start_of(str(loaded.manifest["model"]), graph.dtype)
    weights = profile(graph, model)
    recipe, wanted = text_of(folder, loaded, Evaluate(data=data, batches=batches, batch=batch, length=length))
    text = list(held_out_batches(recipe, for_kind(wanted, graph), loaded.load_tokenizer(), runs / ".cache" / "tokens"))
    if graph.kind == "encoder":
        figures, said = _on_vectors(graph, model, text, pooling_of(recipe))
    else:
        figures, said = _on_text(graph, model, text)
    out = folder.parent / "quality"
    out.mkdir(parents=True, exist_ok=True)
    note = draw(weights, out / "quality.png", str(loaded.manifest.get("stage", "quality")))
    found: Finding = {**figures, "verdict": said, "weights": [asdict(w) for w in weights]}
    (out / "quality.json").write_text(json.dumps(found, indent=1) + "\n")
    rows = [[one.name, f"{one.relative_error:.4f}", f"{one.zero_share:.1%}"] for one in weights[:WORST]]
    shown = table(rows, ["worst weights", "relative error", "zeros"])
    return found | {"folder": str(out), "text": "\n\n".join(filter(None, (shown, note, said, f"wrote {out}")))}


def _on_text(graph: Graph, model: Graph, text: Sequence[Batch]) -> tuple[dict[str, float], str]:
    """What a language model makes of the text, before and after, and the verdict."""
    from runtimes.assess.profile import verdict
    from runtimes.evaluate import evaluate

    before = evaluate(model, text)["perplexity"]
    after = evaluate(graph, text, reference=model, metrics=["perplexity", "kl", "top1"])
    return {"perplexity_before": before, **after}, verdict(before, after["perplexity"])


def _on_vectors(graph: Graph, model: Graph, texts: Sequence[Batch], pooling: Pooling) -> tuple[dict[str, float], str]:
    """How the vectors of an encoder compare with the model's, and the verdict."""
    from runtimes.assess.profile import verdict_on_vectors
    from runtimes.embeddings import compare

    found = compare(graph, model, texts, pooling)
    return found, verdict_on_vectors(found["embedding/cosine"], found["embedding/spearman"])
