"""What trains of LUT weights, as set-trainable says it: the counts of a Qwen3-0.6B at q2a4, by shapes alone."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
from transformers import Qwen3Config

from graph import Graph, capture
from graph.formats import LutOptions
from passes.quantize_base import QuantizeBase
from passes.runner import apply
from passes.set_trainable import SetTrainable
from recipes.load import load

PAGE = Path(__file__).parents[2] / "docs/training.md"

COUNTS = {
    "all scales": 13_303_808 + 3_584,
    "g-only": 3_584,
    "freeze-mags": 13_303_808,
    "freeze-mags-mlp": 13_303_808 + 896,
    "mlp-only": 11_010_048 + 2_688,
    "attn-only": 2_293_760 + 896,
    "norms-only": 2 * 28 * 1024 + 1024,
    "lut-only": 84 * 4 + 112 * 16,
}


LAST_NORM = 1024
"""All else that is counted is the same in every block."""


@cache
def plan(blocks: int) -> Graph:
    """A Qwen3-0.6B at q2a4, without weights, or a lower one of as many blocks."""
    config = Qwen3Config(hidden_size=1024, num_hidden_layers=blocks, num_attention_heads=16, num_key_value_heads=8,
                         head_dim=128, intermediate_size=3072, vocab_size=151_936, tie_word_embeddings=True)  # fmt: skip
    graph = capture(config)
    apply(QuantizeBase(scheme="lut", lut=LutOptions(preset="q2a4")), graph, check=False)
    return graph


def modes() -> dict[str, str]:
    """The table of the page: what is called how, and the pass that says it."""
    table = PAGE.read_text(encoding="utf-8").partition("| what trains |")[2].partition("\n\n")[0]
    return dict(re.findall(r"^\| ([\w -]+) \| `(set-trainable: .*?)` \|", table, re.MULTILINE))


def test_the_page_has_all_of_them() -> None:
    assert list(modes()) == list(COUNTS)


@pytest.mark.parametrize("blocks", [2, pytest.param(28, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", COUNTS)
def test_the_line_of_the_page_trains_as_many_values_as_it_should(mode: str, blocks: int, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: seedling\npasses:\n  - {modes()[mode]}\n")
    (step,) = load(str(recipe)).passes
    assert isinstance(step.step, SetTrainable)
    report = apply(step.step, plan(blocks).copy(), check=False)
    once = LAST_NORM if mode == "norms-only" else 0
    assert report.figures["trainable_values"] == (COUNTS[mode] - once) // 28 * blocks + once
    assert f"` | {COUNTS[mode]:,} |" in PAGE.read_text(encoding="utf-8")
