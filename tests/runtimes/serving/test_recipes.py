"""Every shipped recipe against every target: what its graph can be written as, and why not the rest."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from graph import QcError
from graph.checkpoint import locate
from qc.compiling import _rewrite, plan
from qc.models import Workshop, capture_all
from recipes.load import load
from recipes.shipped import names
from runtimes.export import default_dtype, find, obstacles, targets
from runtimes.serving.settings import TARGETS

TERNARY_ONLY = ("bitnet", "ternary")
DENSE = ("fp16", "qlora", "kd-cache")
"""The recipes that end in float weights."""

TERNARY = ("ternary", "ternary-handoff", "ternary-quality", "ternary-speed")
"""Those that end in ternary weights."""

LUT = {"quickstart": 8, "lut-layerwise": 8, "lut-v1-to-v2": 8, "lut-v2-scratch": 8, "lut-q4-to-q2": 4}
"""Those that end in LUT weights: the rank of scales in attention."""

FIRST = "model.layers.0.self_attn.q_proj.weight"


def refusal(recipe: str, target: str) -> str | None:
    """Why ``target`` cannot take what comes of ``recipe``, of the seedling; None where it can."""
    if recipe.startswith("awareness") and target == "safetensors":
        return None
    if recipe.startswith("awareness"):
        return (
            f"the graph joins encoder and decoder, and {target} holds one model\n"
            "  fix    export a stage from before attach-memory; qc generate --context runs both"
        )
    if target == "mixed" and recipe in DENSE:
        missing = "the graph holds no packed weights, and mixed writes them in the formats that they have"
        return f"{missing}\n  fix    add a quantize-base for each format, or export to one of them"
    if recipe in DENSE:
        missing = "the graph has no ternary weights\n  fix    add ternary-ste and freeze-ternary"
        missing += ", or export to int4" if target == "int2" else ""
        return missing if target in (*TERNARY_ONLY, "int2") else None
    if recipe in TERNARY and target in ("int2", "mixed"):
        return None
    lut = recipe in LUT
    held = f"lut of 16 levels, scales of rank {LUT[recipe]}" if lut else "ternary, groups of 64"
    site = f"\n  site   {FIRST}/dequantize\n  fix    "
    if target == "mixed":
        what = f"{FIRST} holds {held}, and so do 20 more, which compressed-tensors has no form of"
        return f"{what}{site}pack it in another format, or leave it as floats"
    if target in TARGETS:
        what = f"{FIRST} holds {held}, and so do 20 more: as {target} it would be rounded twice"
        own, again = "safetensors" if lut else "int2", "add the pass dequantize before the export, which then rounds"
        if target == "int2":
            return f"{what}{site}export to int4 after the pass dequantize"
        return f"{what}{site}export to {own}, or {again} to {target}"
    if target in TERNARY_ONLY and lut:
        what = f"{FIRST} holds {held}, and so do 20 more, and ternary weights are wanted"
        return f"{what}{site}export to safetensors, or add dequantize, ternary-ste and freeze-ternary, which rounds once more"
    if target == "gguf" and lut:
        what = f"{FIRST} holds {held}, and so do 20 more, and GGUF has no encoding of it"
        again = "add the pass dequantize before the export, which then rounds to q8_0"
        return f"{what}{site}export to safetensors, or {again}"
    if target == "gguf":
        what = f"{FIRST} has a scale for every 64 columns, and GGUF one for every 256"
        return f"{what}{site}set granularity to channel, or group to 256, in ternary-ste"
    if target == "bitnet":
        what = f"{FIRST} has more than one scale, and BitNet's packing one"
        return f"{what}{site}set granularity to tensor in ternary-ste, or export to ternary"
    return None


@cache
def planned(recipe: str) -> tuple[Any, list[QcError]]:
    """The graph behind the last pass, without weights."""
    return plan(load(recipe))


def test_every_recipe_is_told_about() -> None:
    known = {*DENSE, *LUT, *TERNARY}
    assert {name for name in names() if not name.startswith("awareness")} == known


QUICK = ("fp16", "ternary", "quickstart")
"""One of each kind; the others are like one of them, and take as long again each."""


@pytest.mark.parametrize(
    "recipe", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names()]
)
def test_a_shipped_recipe_can_be_written_as_its_format_allows_and_the_rest_is_explained(recipe: str) -> None:
    graph, errors = planned(recipe)
    assert not errors
    for target in targets():
        found = obstacles(target, graph, default_dtype(target), {})
        assert (str(found[0]) if found else None) == refusal(recipe, target), target


def made(recipe: str) -> Any:
    """The graph behind the last pass with weights, as they are before any training."""
    read = load(recipe)
    workshop = Workshop(capture_all(read))
    done: dict[str, Workshop] = {}
    generator = torch.Generator().manual_seed(0)

    def some_tokens(data: Any, tokens: int, length: int, batch: int) -> Any:
        ids = torch.randint(5, 4000, (4, 32), generator=generator)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    for stage in read.plan():
        workshop = workshop if stage.start is None else done[stage.start].copy()
        _rewrite(workshop, read, stage, some_tokens, False, lambda message: None, {})
        done[stage.name] = workshop.copy()
    return workshop.graph


def written(graph: Any, target: str, folder: Path) -> dict[str, int]:
    """Export; the files and their sizes."""
    rows = {"rows": [torch.arange(32)[None]]} if target in ("fp8", "nvfp4") else {}
    report = find(target)(graph, folder, dtype=default_dtype(target), tokenizer=locate("seedling"), **rows)
    return dict(report.files)


def test_the_plain_recipe_is_written_as_every_target_for_servers(tmp_path: Path) -> None:
    graph = made("fp16")
    takes = [target for target in TARGETS if refusal("fp16", target) is None]
    sizes = {target: sum(written(graph, target, tmp_path / target).values()) for target in takes}
    assert sizes["fp8"] > 1.2 * sizes["nvfp4"], "embeddings and head stay as they are"
    assert all((tmp_path / target / "config.json").is_file() for target in takes)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [name for name in names() if not name.startswith("awareness")])
def test_a_shipped_recipe_is_written_as_all_that_its_format_allows(recipe: str, tmp_path: Path) -> None:
    graph = made(recipe)
    for target in targets():
        text = refusal(recipe, target)
        if text is None:
            assert written(graph, target, tmp_path / target), target
            continue
        with pytest.raises(QcError) as error:
            find(target)(graph, tmp_path / target, dtype=default_dtype(target))
        assert str(error.value).startswith(text), target
        assert not (tmp_path / target).exists()
