"""The table of docs/retrieval.md: how much is looked up, with what trained and over which bases.

python tools/awareness_quality.py [--recipe awareness] [--steps N] [--seed 0] [--runs runs/awareness] [--only NAME ...]
                                  [--write]

The recipe as it is, with each way to deploy it; beside it the same over bases in full precision, with an encoder that
is not trained, and with MiniLM as the encoder: the same questions in the same order. Gradient norms are means over the
last tenth of the steps. The column of more chunks asks the same models among more than they were trained with.
What was run before is taken from --runs. With --write the table goes into docs/retrieval.md;
rows that --only leaves out stay what they are there.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SCORES = ("exact_match", "exact_match/no_memory", "exact_match/shuffled", "memory_contribution")

MORE = 16
"""Chunks of the last column: more than any training had, so that what nearly fails shows."""


@dataclass(frozen=True)
class Row:
    """What came of one model."""

    name: str
    scores: Mapping[str, float]
    norms: Mapping[str, float]
    """Of the gradients, by group; nothing for what did not train."""

    seconds: float | None


def whole(recipe: dict[str, Any]) -> None:
    """The recipe as it is."""


def full_bases(recipe: dict[str, Any]) -> None:
    """Take the quantization of the bases out, and what follows the training."""
    _until_trained(recipe)
    _without(recipe, "quantize-base")


def frozen_encoder(recipe: dict[str, Any]) -> None:
    """Take LoRA out, so that the encoder stays as it came, and what follows the training."""
    _until_trained(recipe)
    _without(recipe, "add-lora")
    for stage in recipe["stages"]:
        (stage.get("train") or {}).get("groups", {}).pop("encoder", None)
        asked = stage.get("require", [])
        stage["require"] = [gate for gate in asked if gate["metric"] != "train/encoder_grad_norm"]


def minilm_reads(recipe: dict[str, Any]) -> None:
    """Take MiniLM for the encoder: wider, looking both ways, of other tokens; and what follows the training out.

    LoRA at its 36 linears takes a sixth of the recipe's rate: with all of it the encoder forgets what it knew in the
    first thirty steps, its gradients vanish, and nothing is learned.
    """
    from tools.minilm import minilm

    _until_trained(recipe)
    recipe["models"]["encoder"]["model"] = str(minilm())
    next(s for s in recipe["stages"] if s.get("train"))["train"]["groups"]["encoder"]["lr"] = 5.0e-4


CASES: dict[str, Callable[[dict[str, Any]], None]] = {
    "as it is": whole,
    "bases in full precision": full_bases,
    "encoder not trained": frozen_encoder,
    "MiniLM as the encoder": minilm_reads,
}


def _until_trained(recipe: dict[str, Any]) -> None:
    last = max(at for at, stage in enumerate(recipe["stages"]) if stage.get("train"))
    del recipe["stages"][last + 1 :]


def _without(recipe: dict[str, Any], kind: str) -> None:
    for stage in recipe["stages"]:
        stage["passes"] = [step for step in stage.get("passes", []) if not (isinstance(step, dict) and kind in step)]


def run_case(name: str, recipe: Path, sets: list[str], runs: Path) -> list[Row]:
    """The rows of one case: the trained model, then every other form of it that the recipe ends in."""
    from qc.api import run

    changed = YAML(typ="safe").load(recipe.read_text())
    CASES[name](changed)
    for stage in changed["stages"] if CASES[name] is not whole else ():
        stage["require"] = [g for g in stage.get("require", []) if not g["metric"].startswith(("exact", "eval"))]
    folder = runs / "recipes"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{recipe.stem}-{name.replace(' ', '-')}.yaml"
    with open(path, "w") as file:
        YAML(typ="safe").dump(changed, file)
    print(name, file=sys.stderr, flush=True)
    measured = run(path, set=sets, runs=runs, tell=lambda message: print(f"    {message}", file=sys.stderr, flush=True))
    found = []
    for entry in measured:
        if "exact_match" not in entry or entry["step"] == "start":
            continue
        stage, _, what = str(entry["step"]).rpartition("/")
        trains = any(one["name"] == stage and one.get("train") for one in changed["stages"])
        if trains and what == "compiled":
            continue
        norms = _norms(Path(entry["folder"]).parent / "train" / "metrics.csv") if trains else {}
        scores = {key: float(entry[key]) for key in SCORES}
        scores["more"] = with_more_chunks(Path(entry["folder"]), path)
        found.append(Row(name if trains else f"{name}: {stage}", scores, norms, entry.get("seconds")))
    return found


def with_more_chunks(folder: Path, recipe: Path) -> float:
    """The exact matches of an artifact on the held-out questions of its recipe, each among ``MORE`` chunks."""
    from graph.artifact import load
    from recipes.load import load as load_recipe
    from runtimes.retrieval import Questions
    from runtimes.retrieval.recall import recall
    from runtimes.settings import Retrieval

    asked = next(stage.evaluate for stage in load_recipe(recipe).plan() if stage.evaluate is not None)
    assert isinstance(asked.data, Retrieval), "the recipe asks questions"
    artifact = load(folder)
    questions = Questions(
        replace(asked.data, chunks=MORE), "heldout", length=asked.length,
        tokenizer=artifact.load_tokenizer(), memory_tokenizer=artifact.load_memory_tokenizer(),
    )  # fmt: skip
    found = recall(artifact.graph.materialize(), questions, batches=asked.batches, batch=asked.batch)
    return found["exact_match"]


def _norms(path: Path) -> dict[str, float]:
    """Mean norms of the gradients of each group over the last tenth of a training."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    last = rows[-max(1, len(rows) // 10) :]
    groups = [key for key in rows[0] if key.startswith("grad_norm/")]
    return {key.removeprefix("grad_norm/"): statistics.mean(float(row[key]) for row in last) for key in groups}


def table(rows: list[Row]) -> str:
    """One line for each row."""
    lines = [
        f"| | with memory | none | shuffled | contribution | of {MORE} chunks | encoder | cross-attention |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        shares = " | ".join(f"{100 * row.scores[key]:.1f} %" for key in (*SCORES, "more"))
        norms = " | ".join(f"{row.norms[key]:.4f}" if key in row.norms else "" for key in ("encoder", "gca"))
        lines.append(f"| {row.name} | {shares} | {norms} |")
    return "\n".join(lines)


def main() -> None:
    """Run all cases and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="awareness", help="a shipped recipe or a file")
    parser.add_argument("--steps", type=int, help="of the stage called learn; without it, the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs/awareness"))
    parser.add_argument("--only", nargs="+", help="the first letters of names")
    parser.add_argument("--write", action="store_true", help="put the table into docs/retrieval.md")
    said = parser.parse_args()
    shipped = ROOT / "recipes" / f"{said.recipe}.yaml"
    recipe = shipped if shipped.is_file() else Path(said.recipe)
    sets = [f"seed={said.seed}", *([f"learn.train.steps={said.steps}"] if said.steps else [])]
    names = [n for n in CASES if not said.only or any(n.startswith(each) for each in said.only)]
    text = table([row for name in names for row in run_case(name, recipe.resolve(), sets, said.runs)])
    print(text)
    if said.write:
        from tools.bench.tables import replace_table, with_other_rows

        page = "retrieval.md"
        replace_table("awareness", with_other_rows("awareness", text, page) if said.only else text, page)


if __name__ == "__main__":
    main()
