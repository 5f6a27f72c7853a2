"""The table of ternary weights beside their control, and what the shipped recipe brings back of what rounding costs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.bench.turns import ROOT
from tools.ternary_quality import BATCHES, HALF, Budget, run_recipe, run_rounded, table

FIGURES = {
    "bytes": 1000, "formula_error": 0.001, "ratio_vs_fp32": 2.5, "ratio_vs_fp16": 1.25, "bits_per_weight": 12.8,
    "zero_share": 0.4,
}  # fmt: skip


def budget(steps: int, trained: float, control: float) -> Budget:
    record = {"figures": FIGURES, "arithmetic": "One and one is two"}
    compiled = {"perplexity": 15.0, "kl": 0.4, "top1": 0.6}
    return Budget(steps, 10.0, compiled, {"perplexity": trained, "kl": 0.1, "top1": 0.8}, control, 0.9996, record)


def test_the_table_has_a_line_for_every_budget_and_the_verdicts_are_of_the_worst() -> None:
    rounded = {"perplexity": 20.0, "kl": 0.8, "top1": 0.5}
    assert table([budget(75, 11.0, 10.0), budget(150, 10.5, 9.0)], rounded) == (
        "| | steps | perplexity | KL | top-1 | control | over the control | fidelity |\n"
        "|---|---|---|---|---|---|---|---|\n"
        "| FP16 | | 10.00 | 0 | 100 % | | | |\n"
        "| ternary, each weight rounded | 0 | 20.00 | 0.800 | 50.0% | 10.00 | 2.00 x | |\n"
        "| ternary, as compiled | 0 | 15.00 | 0.400 | 60.0% | 10.00 | 1.50 x | |\n"
        "| ternary, recovered | 75 | 11.00 | 0.100 | 80.0% | 10.00 | 1.10 x | 100.0% |\n"
        "| ternary, recovered | 150 | 10.50 | 0.100 | 80.0% | 9.00 | 1.17 x | 100.0% |\n"
        "\n"
        "The worst is 1.167 times its control, after 150 steps: not within the goal of 1.15.\n"
        "Of the perplexity of weights that are only rounded it is 0.550 after 75 steps, 0.525 after 150 steps; "
        "the goal is 0.5.\n"
        "The file has 1,000 bytes, +0.10% of the formula: 2.50 times smaller than fp32, 1.25 than fp16, "
        "12.80 bits per weight, 40.0% zeros.\n"
        "One and one is two."
    )
    assert "1.100 times its control, after 75 steps: within" in table([budget(75, 11.0, 10.0)], rounded)


@pytest.mark.slow
def test_the_recipe_is_near_the_float_model_and_at_half_of_what_rounding_leaves(tmp_path: Path) -> None:
    rounded = run_rounded(0, tmp_path, ())
    said = [f"{stage}.evaluate.batches={BATCHES}" for stage in ("recover", "quantized")]
    found = run_recipe(
        ROOT / "recipes/ternary.yaml",
        ["seed=0", "recover.train.steps=300", "recover.train.eval_every=0", *said],
        tmp_path,
    )
    full, trained = (float(found[step]["perplexity"]) for step in ("start", "quantized/compiled"))
    told = f"{full:.2f} in full, {rounded['perplexity']:.2f} rounded, {trained:.2f} trained"
    assert trained <= 1.2 * full, told
    assert trained <= HALF * rounded["perplexity"], told
