"""The table of docs/quality.md: low-bit LUT weights on the seedling, as compiled and as trained, over several seeds.

python tools/quality.py [--steps 120] [--seeds 0 1 2] [--runs runs/quality] [--only NAME ...] [--write]

Every row trains on the same number of tokens (--steps times 1,024) and is measured on the same held-out files. What
was run before is taken from --runs. With --write the table goes into docs/quality.md.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

BATCHES = 32
"""Held-out batches of 1,024 tokens."""


@dataclass(frozen=True)
class Case:
    """One way to a low-bit model."""

    name: str
    recipe: str
    shares: dict[str, float]
    """Stage -> its share of the steps; they add up to one."""

    overrides: tuple[str, ...] = ()


FEEDBACK = ("scales.calibrate.covariance=true",)
"""Errors of one column are made good by others."""

CASES = (
    Case("q4a4", "lut-v2-scratch", {"scales": 1}, ("base.lut.preset=q4a4",)),
    Case("q2a4 (workflow B)", "lut-v2-scratch", {"scales": 1}),
    Case("q2a2", "lut-v2-scratch", {"scales": 1}, ("base.lut.preset=q2a2",)),
    Case("q2a4, workflow A", "lut-v1-to-v2", {"scales": 1 / 3, "weights": 1 / 3, "factored": 1 / 3}),
    Case("q2a4, workflow C", "lut-q4-to-q2", {"q4": 1 / 3, "q2": 2 / 3}),
    Case(
        "q2a4, uniform levels, absmax scales",
        "lut-v2-scratch",
        {"scales": 1},
        ("base.lut.levels=uniform", "base.lut.fit=absmax"),
    ),
    Case("q4a4, rounded with feedback", "lut-v2-scratch", {"scales": 1}, ("base.lut.preset=q4a4", *FEEDBACK)),
    Case("q2a4, rounded with feedback", "lut-v2-scratch", {"scales": 1}, FEEDBACK),
    Case("q2a2, rounded with feedback", "lut-v2-scratch", {"scales": 1}, ("base.lut.preset=q2a2", *FEEDBACK)),
)


@dataclass(frozen=True)
class Found:
    """What came of one case with one seed."""

    full: float
    """Perplexity of the FP16 model."""

    compiled: dict[str, float]
    """Of the first stage before training: perplexity, kl, top1."""

    trained: dict[str, float]
    """Of the baked model."""

    bits: float
    """Stored bits per quantized weight, levels and scales included."""

    losses: list[float]
    """Of every step of the last stage that trains."""


def run_case(case: Case, seed: int, steps: int, runs: Path) -> Found:
    """Run the recipe of ``case``, or take what was run before."""
    from qc.api import run

    said = [f"seed={seed}", *case.overrides]
    for stage, share in case.shares.items():
        said += [f"{stage}.train.steps={round(steps * share)}", f"{stage}.evaluate.batches={BATCHES}"]
    said += [f"deploy.evaluate.batches={BATCHES}"]
    print(f"{case.name}, seed {seed}", file=sys.stderr, flush=True)
    recipe = ROOT / "recipes" / f"{case.recipe}.yaml"
    measured = {str(each["step"]): each for each in run(recipe, set=said, runs=runs, tell=_tell)}
    first, last = next(iter(case.shares)), list(case.shares)[-1]
    baked = Path(measured["deploy/compiled"]["folder"])
    with open(baked.parent.parent / last / "train" / "metrics.csv", newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file) if row.get("loss")]
    return Found(
        float(measured["start"]["perplexity"]),
        _figures(measured[f"{first}/compiled"]),
        _figures(measured["deploy/compiled"]),
        stored_bits(baked),
        losses,
    )


def _tell(message: str) -> None:
    print(f"    {message}", file=sys.stderr, flush=True)


def _figures(entry: dict[str, Any]) -> dict[str, float]:
    return {key: float(entry[key]) for key in ("perplexity", "kl", "top1")}


def stored_bits(artifact: Path) -> float:
    """Bits of all that packed weights are stored as, over the number of these weights."""
    from graph.artifact import load
    from graph.formats import packed_sites

    graph, bits, weights = load(artifact).graph, 0, 0
    for site in packed_sites(graph):
        weights += site.value.numel()
        bits += sum(8 * graph.dtype_of(name).itemsize * math.prod(graph.shape(name)) for name in site.tensors())
    return bits / weights


def table(rows: dict[str, list[Found]]) -> str:
    """One line per case; means over the seeds, and half the range between them."""
    full = next(iter(rows.values()))[0].full
    lines = [
        "| | bits per weight | perplexity as compiled | KL | perplexity as trained | KL | over FP16 | top-1 | seeds |",
        "|---|---|---|---|---|---|---|---|---|",
        f"| FP16 | 16 | {full:.2f} | 0 | | | | 100 % | |",
    ]
    for name, found in rows.items():
        last = [each.trained for each in found]
        over = _spread([100 * (each["perplexity"] / full - 1) for each in last], 1)
        lines.append(
            f"| {name} | {found[0].bits:.2f} | {_spread([f.compiled['perplexity'] for f in found], 2)} "
            f"| {_spread([f.compiled['kl'] for f in found], 4)} | {_spread([e['perplexity'] for e in last], 2)} "
            f"| {_spread([e['kl'] for e in last], 4)} | {over} % "
            f"| {_spread([100 * e['top1'] for e in last], 1)} % | {len(found)} |"
        )
    return "\n".join(lines)


def _spread(values: Sequence[float], digits: int) -> str:
    middle, half = statistics.mean(values), (max(values) - min(values)) / 2
    return f"{middle:.{digits}f}" + (f" ± {half:.{digits}f}" if half >= 0.5 * 10**-digits else "")


def verdicts(rows: dict[str, list[Found]], steps: int) -> str:
    """The sentences under the table: what a fitted start gains, and whether going through 4 bits does."""
    said = []
    uniform, fitted = (rows.get(CASES[n].name) for n in (5, 1))
    if uniform and fitted:
        ratio = fitted[0].compiled["kl"] / uniform[0].compiled["kl"]
        said.append(f"The fitted start has {ratio:.2f} times the KL of uniform levels with absmax scales.")
    through = rows.get(CASES[4].name)
    if fitted and through:
        goals = [statistics.mean(each.losses[-10:]) for each in fitted]
        reached = [_reached(c.losses, goal) for c, goal in zip(through, goals, strict=False)]
        starts = ", ".join("never" if at is None else f"after {at} steps" for at in reached)
        said.append(
            f"Workflow B ends at a training loss of {statistics.mean(goals):.4f} after {steps} steps. At 2 bits, after "
            f"{round(steps / 3)} steps at 4 bits, workflow C reaches that: {starts} (by seed)."
        )
    return "\n".join(said)


def _reached(losses: Sequence[float], goal: float) -> int | None:
    """The first step up to which the mean of ten losses is at ``goal`` or below."""
    return next((n for n in range(10, len(losses) + 1) if statistics.mean(losses[n - 10 : n]) <= goal), None)


def main() -> None:
    """Run all cases and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"))
    parser.add_argument("--only", nargs="+", help="the first letters of names")
    parser.add_argument("--write", action="store_true", help="put the table into docs/quality.md")
    said = parser.parse_args()
    cases = [c for c in CASES if not said.only or any(c.name.startswith(each) for each in said.only)]
    rows: dict[str, list[Found]] = {case.name: [] for case in cases}
    for seed in said.seeds:
        for case in cases:
            rows[case.name].append(run_case(case, seed, said.steps, said.runs))
    text = f"{table(rows)}\n\n{verdicts(rows, said.steps)}".rstrip()
    print(text)
    if said.write:
        from tools.bench.tables import replace_table, with_other_rows

        replace_table("quality", with_other_rows("quality", text) if said.only else text)


if __name__ == "__main__":
    main()
