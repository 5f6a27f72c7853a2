"""Looking at an artifact before it is trained on: whether gradients flow, and how hard text is for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from graph.artifact import Artifact, load
from graph.errors import QcError
from qc.compiling import stage_name, step_name
from qc.console import table
from qc.evaluating import text_of
from qc.measuring import held_out_batches
from qc.runs import Run
from qc.training import start_of
from recipes.schema import Recipe, Stage
from runtimes.assess_settings import Assess, Audit
from runtimes.data import Batch
from runtimes.settings import Data, Evaluate

Tell = Callable[[str], None]


def audit_stage(run: Run, recipe: Recipe, stage: Stage, artifact: Path, tell: Tell) -> None:
    """What ``audit:`` asks for, of what the passes made; the figures are kept in the run."""
    assert stage.audit is not None
    loaded = load(artifact, check_hashes=False)
    wanted = Evaluate(data=stage.audit.data, batches=1, batch=stage.audit.batch, length=stage.audit.length)
    (batch,) = _batches(run, recipe, wanted, loaded)
    found = _audited(loaded, batch, stage.audit, run.stage(stage.name))
    run.measure(step_name(stage, "compiled"), **found.figures())
    tell(f"{stage_name(stage)}{found.said()}")


def assess_stage(run: Run, recipe: Recipe, stage: Stage, artifact: Path, tell: Tell) -> None:
    """What ``assess:`` asks for, of what the passes made; the figures are kept in the run."""
    assert stage.assess is not None
    loaded = load(artifact, check_hashes=False)
    wanted = _evaluate(stage.assess)
    found = _assessed(loaded, _batches(run, recipe, wanted, loaded), stage.assess, run.stage(stage.name) / "assess")
    run.measure(step_name(stage, "compiled"), **found["figures"])
    tell(f"{found['text']}\n{stage_name(stage)}{found['said']}")


def assess_artifact(folder: Path, data: Data | None, wanted: Assess, runs: Path) -> dict[str, Any]:
    """``qc assess``: levels, and an audit where something trains; files go into ``assess`` beside the artifact."""
    loaded = load(folder)
    recipe, said = text_of(folder, loaded, replace(_evaluate(wanted), data=data))
    batches = list(held_out_batches(recipe, said, loaded.load_tokenizer(), runs / ".cache" / "tokens"))
    out = folder.parent / "assess"
    found = _assessed(loaded, batches, wanted, out)
    if any(info.trainable for info in loaded.graph.tensors().values()):
        audited = _audited(loaded, batches[0], Audit(), out)
        found["figures"] |= audited.figures()
        found["text"] += f"\n\n{audited.said()}"
    return found | {"folder": str(out)}


def asked(options: dict[str, Any]) -> Assess:
    """What the command line asks for; values that no recipe could hold are errors."""
    if options["by"] not in ("corruption", "loss"):
        raise QcError(f"--by cannot be {options['by']!r}", fix="use corruption or loss")
    for key, least in (("levels", 1), ("batches", 1), ("batch", 1), ("length", 2)):
        if options[key] < least:
            raise QcError(f"--{key} is {options[key]}", fix=f"give a number from {least}")
    for key in ("target", "tolerance"):
        if not 0 <= options[key] <= 1:
            raise QcError(f"--{key} is {options[key]:g}, and accuracies are shares", fix="give a number from 0 to 1")
    return Assess(**options)


def _evaluate(wanted: Assess) -> Evaluate:
    return Evaluate(data=wanted.data, batches=wanted.batches, batch=wanted.batch, length=wanted.length)


def _batches(run: Run, recipe: Recipe, wanted: Evaluate, loaded: Artifact) -> list[Batch]:
    cache = run.folder.parent.parent / ".cache" / "tokens"
    found = list(held_out_batches(recipe, wanted, loaded.load_tokenizer(), cache))
    if not found:
        raise QcError("there is no held-out text", fix="give more text, or shorter rows")
    return found


def _audited(loaded: Artifact, batch: Batch, wanted: Audit, folder: Path) -> Any:
    from runtimes.assess.audit import audit

    return audit(loaded.graph.materialize(), batch, folder=folder, spots=wanted.spots)


def _assessed(loaded: Artifact, batches: list[Batch], wanted: Assess, out: Path) -> dict[str, Any]:
    from graph.probe import vocabulary
    from runtimes.assess import levels, plot
    from runtimes.assess.assess import HEAD, assess

    graph = loaded.graph.materialize()
    if wanted.by == "corruption":
        made = levels.corrupted(batches, wanted.levels, vocabulary(graph))
    else:
        made = levels.by_loss(batches, _losses(str(loaded.manifest["model"]), graph.dtype, batches), wanted.levels)
    out.mkdir(parents=True, exist_ok=True)
    found = assess(
        graph, made, target=wanted.target, tolerance=wanted.tolerance, micro_batches=wanted.micro_batches, folder=out
    )
    found.write(out)
    note = plot.draw(found, out / "assess.png", str(loaded.manifest.get("stage", "assess")))
    text = table(found.rows(), list(HEAD))
    return {
        "figures": found.figures(), "said": found.crossing.said, "text": text + (f"\n{note}" if note else ""),
        "levels": [row for row in found.rows()], "nearest": found.crossing.nearest,
    }  # fmt: skip


def _losses(model: str, dtype: Any, batches: list[Batch]) -> list[float]:
    """The loss of each row to the model before the passes, in nats per label."""
    from runtimes.evaluate import evaluate

    reference, found = start_of(model, dtype), []
    for batch in batches:
        for row in range(len(batch.input_ids)):
            one = Batch(*(t[row : row + 1] for t in (batch.input_ids, batch.attention_mask, batch.labels)))
            found.append(evaluate(reference, [one])["loss"])
    return found
