"""``qc quality``: what compression did, weight by weight and on text."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from graph.artifact import load
from qc.console import table
from qc.evaluating import text_of
from qc.measuring import held_out_batches
from qc.training import start_of
from runtimes.settings import Data, Evaluate

Finding = dict[str, Any]


def judge_artifact(folder: Path, data: Data | None, batches: int, batch: int, length: int, runs: Path) -> Finding:
    """The worst weights, both perplexities and a verdict; all of it goes into ``quality`` beside the artifact."""
    from runtimes.assess.profile import WORST, draw, profile, verdict
    from runtimes.evaluate import evaluate

    loaded = load(folder)
    graph = loaded.graph.materialize()
    model = start_of(str(loaded.manifest["model"]), graph.dtype)
    weights = profile(graph, model)
    recipe, wanted = text_of(folder, loaded, Evaluate(data=data, batches=batches, batch=batch, length=length))
    text = list(held_out_batches(recipe, wanted, loaded.load_tokenizer(), runs / ".cache" / "tokens"))
    before = evaluate(model, text)["perplexity"]
    after = evaluate(graph, text, reference=model, metrics=["perplexity", "kl", "top1"])
    out = folder.parent / "quality"
    out.mkdir(parents=True, exist_ok=True)
    note = draw(weights, out / "quality.png", str(loaded.manifest.get("stage", "quality")))
    said = verdict(before, after["perplexity"])
    found: Finding = {"perplexity_before": before, **after, "verdict": said, "weights": [asdict(w) for w in weights]}
    (out / "quality.json").write_text(json.dumps(found, indent=1) + "\n")
    rows = [[one.name, f"{one.relative_error:.4f}", f"{one.zero_share:.1%}"] for one in weights[:WORST]]
    shown = table(rows, ["worst weights", "relative error", "zeros"])
    return found | {"folder": str(out), "text": "\n\n".join(filter(None, (shown, note, said)))}
