"""The table of docs/ternary.md: ternary weights on the seedling, as compiled and after three budgets of training.

python tools/ternary_quality.py [--steps 40 80 160] [--seed 0] [--runs runs/ternary] [--set KEY=VALUE ...] [--write]

Beside each budget stands the control: the FP16 model itself, trained for as many steps on the same text. What the
weights are where each is rounded by itself, and nothing made good, has a row too. All are measured on the same
held-out files. What was run before is taken from --runs. With --write the table goes into docs/ternary.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

BATCHES = 16
"""Held-out batches of 1,024 tokens."""

GOAL = 1.15
"""What a ternary perplexity may be, as a multiple of the control's."""

HALF = 0.5
"""What it may be of that of the weights where each is only rounded."""


@dataclass(frozen=True)
class Budget:
    """What came of so many steps."""

    steps: int
    full: float
    """Perplexity of the FP16 model."""

    compiled: Mapping[str, float]
    trained: Mapping[str, float]
    """Perplexity, KL and top-1 before and after the training."""

    control: float
    fidelity: float
    record: Mapping[str, Any]
    """Of the exported file: its sizes, and the arithmetic behind them."""


def run_budget(steps: int, seed: int, runs: Path, overrides: Sequence[str]) -> Budget:
    """Run the recipe and its control, or take what was run before."""
    common = [f"seed={seed}"]
    said = [*common, f"recover.train.steps={steps}", "recover.train.when=", *overrides]
    said += [f"{stage}.evaluate.batches={BATCHES}" for stage in ("recover", "quantized")]
    ternary = run_recipe(ROOT / "recipes/ternary.yaml", said, runs)
    control = run_recipe(
        ROOT / "tools/ternary_control.yaml", [*common, f"train.steps={steps}", f"evaluate.batches={BATCHES}"], runs
    )
    exported = ternary["quantized/export ternary fp16"]
    return Budget(
        steps,
        float(ternary["start"]["perplexity"]),
        _figures(ternary["recover/compiled"]),
        _figures(ternary["quantized/compiled"]),
        float(control["trained"]["perplexity"]),
        float(exported["dequant_fidelity"]),
        json.loads((Path(exported["folder"]) / "ternary.json").read_text()),
    )


def run_rounded(seed: int, runs: Path, overrides: Sequence[str]) -> dict[str, float]:
    """Of the recipe with every weight rounded by itself, and no training."""
    said = [f"seed={seed}", "calibrate.covariance=false", "recover.train.when=perplexity_increase > 1000000 %"]
    said += [*overrides, *(f"{stage}.evaluate.batches={BATCHES}" for stage in ("recover", "quantized"))]
    return _figures(run_recipe(ROOT / "recipes/ternary.yaml", said, runs)["recover/compiled"])


def run_recipe(recipe: Path, said: Sequence[str], runs: Path) -> dict[str, Any]:
    """Run it, or take what was run before: the figures of its steps by name."""
    from qc.api import run

    print(f"{recipe.stem} {' '.join(said)}", file=sys.stderr, flush=True)
    return {str(each["step"]): each for each in run(recipe, set=said, runs=runs, tell=_tell)}


def _tell(message: str) -> None:
    print(f"    {message}", file=sys.stderr, flush=True)


def _figures(entry: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(entry[key]) for key in ("perplexity", "kl", "top1")}


def table(found: Sequence[Budget], rounded: Mapping[str, float]) -> str:
    """One line for the model, two without training, one for each budget; and what the files come to."""
    first, figures = found[0], found[0].record["figures"]
    lines = [
        "| | steps | perplexity | KL | top-1 | control | over the control | fidelity |",
        "|---|---|---|---|---|---|---|---|",
        f"| FP16 | | {first.full:.2f} | 0 | 100 % | | | |",
        f"| ternary, each weight rounded | 0 | {_cells(rounded)} | {first.full:.2f} "
        f"| {rounded['perplexity'] / first.full:.2f} x | |",
        f"| ternary, as compiled | 0 | {_cells(first.compiled)} | {first.full:.2f} "
        f"| {first.compiled['perplexity'] / first.full:.2f} x | |",
    ]
    for one in found:
        ratio = one.trained["perplexity"] / one.control
        lines.append(
            f"| ternary, recovered | {one.steps} | {_cells(one.trained)} | {one.control:.2f} | {ratio:.2f} x "
            f"| {one.fidelity:.1%} |"
        )
    lines += ["", *_verdicts(found, rounded)]
    lines += [
        f"The file has {figures['bytes']:,} bytes, {figures['formula_error']:+.2%} of the formula: "
        f"{figures['ratio_vs_fp32']:.2f} times smaller than fp32, {figures['ratio_vs_fp16']:.2f} than fp16, "
        f"{figures['bits_per_weight']:.2f} bits per weight, {figures['zero_share']:.1%} zeros.",
        f"{first.record['arithmetic']}.",
    ]
    return "\n".join(lines)


def _verdicts(found: Sequence[Budget], rounded: Mapping[str, float]) -> list[str]:
    """How the budgets stand to the control, and to what rounding leaves."""
    worst = max(found, key=lambda one: one.trained["perplexity"] / one.control)
    ratio = worst.trained["perplexity"] / worst.control
    within = "within" if ratio <= GOAL else "not within"
    shares = [one.trained["perplexity"] / rounded["perplexity"] for one in found]
    listed = ", ".join(f"{share:.3f} after {one.steps} steps" for share, one in zip(shares, found, strict=True))
    return [
        f"The worst is {ratio:.3f} times its control, after {worst.steps} steps: {within} the goal of {GOAL}.",
        f"Of the perplexity of weights that are only rounded it is {listed}; the goal is {HALF}.",
    ]


def _cells(figures: Mapping[str, float]) -> str:
    return f"{figures['perplexity']:.2f} | {figures['kl']:.3f} | {figures['top1']:.1%}"


def main() -> None:
    """Run all budgets and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[40, 80, 160])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs/ternary"))
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of recipes/ternary.yaml")
    parser.add_argument("--write", action="store_true", help="put the table into docs/ternary.md")
    said = parser.parse_args()
    rounded, found = run_rounded(said.seed, said.runs, said.set), []
    for steps in said.steps:
        found.append(run_budget(steps, said.seed, said.runs, said.set))
        print(table(found, rounded), flush=True)
    if said.write:
        from tools.bench.tables import replace_table

        replace_table("ternary", table(found, rounded), page="ternary.md")


if __name__ == "__main__":
    main()
