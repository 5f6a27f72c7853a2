"""The table of ternary encoders: what it counts, and that the page shows the recipe it runs."""

from __future__ import annotations

import re
from typing import Any

import torch
from ruamel.yaml import YAML

from tests.runtimes.train.tiny import tiny_graph
from tools.bench.tables import DOCS
from tools.bench.turns import ROOT
from tools.ternary_encoder import Row, halves, table


def test_halves_that_are_alike_find_each_other() -> None:
    from graph.encoder import as_encoder

    graph = as_encoder(tiny_graph("nothing"))
    first = torch.randint(0, 200, (20, 8), generator=torch.Generator().manual_seed(0))
    assert halves(graph, torch.cat([first, first], dim=1)) == 1.0
    assert halves(graph, torch.cat([first, first.roll(1, 0)], dim=1)) == 0.0


def test_the_table_has_a_line_for_every_encoder_and_the_arithmetic() -> None:
    figures = {"bytes": 1000, "formula_error": 0.001, "ratio_vs_fp32": 2.5, "bits_per_weight": 12.8, "zero_share": 0.4}
    rows = [Row("FP32", None, 1, 1, 0.5), Row("ternary, recovered", 30, 0.9, 0.8, 0.25)]
    assert table(rows, {"figures": figures, "arithmetic": "One and one is two"}) == (
        "| | steps | cosine | rank correlation | halves found |\n"
        "|---|---|---|---|---|\n"
        "| FP32 |  | 1.000 | 1.000 | 50.0% |\n"
        "| ternary, recovered | 30 | 0.900 | 0.800 | 25.0% |\n"
        "\n"
        "The file has 1,000 bytes, +0.10% of the formula: 2.50 times smaller than fp32, 12.80 bits per weight, "
        "40.0% zeros.\n"
        "One and one is two."
    )


def test_the_page_shows_the_recipe_that_the_table_is_made_by() -> None:
    page = (DOCS / "ternary.md").read_text().partition("### An encoder")[2]
    found = re.search(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert found is not None
    read = YAML(typ="safe")
    shown: dict[str, Any] = read.load(found[1])
    run: dict[str, Any] = read.load((ROOT / "tools/ternary_encoder.yaml").read_text())
    assert {**shown, "model": None} == {**run, "model": None}
