"""Recipes whose model came packed: LoRA trains beside the integers of others, and what is exported is the sum."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.graph.test_prequantized import pack_in
from tests.qc.command import answer, qc

TUNED = """
model: MODEL
stages:
  - name: tune
    passes:
      - add-lora: {rank: 2, alpha: 4}
        name: lora
    train: {data: {text: corpus/*.txt}, steps: 3, batch: 2, length: 16, lr: 1.0e-2, plot: false}
  - name: merge
    passes:
      - merge-lora: {into: INTO}
    export:
      - {target: TARGET, dtype: fp16}
"""

PACKED = """
model: tiny
passes:
  - quantize-base: {scheme: int4, block: 32}
export:
  - {target: int4, dtype: fp16}
"""


def run(folder: Path, model: str, into: str, target: str) -> dict[str, Path]:
    """Run the recipe as a user would; the folder of the run and of every export."""
    name = Path(model).name
    text = TUNED.replace("MODEL", model).replace("INTO", into).replace("TARGET", target)
    (folder / f"{name}-{into}.yaml").write_text(text)
    return folders(folder, f"{name}-{into}.yaml")


def folders(folder: Path, recipe: str) -> dict[str, Path]:
    """Run a recipe; the folder of the run and of every export. One that is not verified ends it with an error."""
    said: dict[str, Any] = answer(qc("run", recipe, "--json", cwd=folder))
    exports = {step["step"]: folder / step["folder"] for step in said["steps"] if "export" in step["step"]}
    return {"run": folder / said["run"], **exports}


def test_lora_over_a_gptq_checkpoint_is_trained_merged_exported_and_verified(folder: Path) -> None:
    made, dense = pack_in(Path(shutil.copytree(folder / "tiny", folder / "gptq")), "gptq in order of what matters")
    before = load_file(made / "model.safetensors")
    steps = run(folder, "gptq", "dequantized", "safetensors")
    trained = load_file(steps["run"] / "tune/trained/weights.safetensors")
    exported = load_file(steps["merge/export safetensors fp16"] / "model.safetensors")
    moved = 0
    for name, value in dense.items():
        module = name.removesuffix(".weight")
        codes = before[f"{module}.qweight"].t().contiguous().view(torch.uint8)
        assert trained[f"{name}.indices"].equal(codes), "the integers are those of the checkpoint"
        a, b = (trained[f"{module}.lora_{one}.default.weight"] for one in "AB")
        moved += int(b.count_nonzero() > 0)
        assert exported[name].allclose((value + 2.0 * b @ a).half(), rtol=1e-3, atol=1e-5)
        assert not exported[name].equal(value.half()), "LoRA is in it"
    assert moved == len(dense) == 14
    config = json.loads((steps["merge/export safetensors fp16"] / "config.json").read_text())
    assert "quantization_config" not in config


def test_a_model_that_is_its_own_teacher_is_told_so_before_it_trains(folder: Path) -> None:
    text = TUNED.replace("MODEL", "tiny").replace("INTO", "dequantized").replace("TARGET", "safetensors")
    (folder / "own.yaml").write_text(text.replace("steps: 3", "objective: kd, steps: 3"))
    done = qc("run", "own.yaml", cwd=folder)
    assert done.code == 1
    assert done.err.partition("error: ")[2] == (
        "kd has nothing to teach: no pass has changed what the model computes, and it is the teacher\n"
        f"  recipe {folder / 'own.yaml'}\n"
        "  fix    take objective out to learn from the text, or pack the full model with quantize-base in this recipe\n"
    )


@pytest.mark.slow
def test_an_int4_export_is_tuned_requantized_and_exported_in_int4_again(folder: Path) -> None:
    (folder / "packed.yaml").write_text(PACKED)
    first = folders(folder, "packed.yaml")["export int4 fp16"]
    shutil.copytree(first, folder / "int4")
    steps = run(folder, "int4", "requantized", "int4")
    again = steps["merge/export int4 fp16"]
    before, after = (load_file(one / "model.safetensors") for one in (first, again))
    assert before.keys() == after.keys()
    words = [name for name in before if name.endswith("weight_packed")]
    assert len(words) == 14 and any(not before[name].equal(after[name]) for name in words), "integers have moved"
    same = [name for name in before if not name.endswith(("weight_packed", "weight_scale"))]
    assert all(before[name].equal(after[name]) for name in same)
    said = [json.loads((one / "config.json").read_text())["quantization_config"] for one in (first, again)]
    assert said[0] == said[1]


def test_zero_points_have_no_place_in_int4_and_the_check_says_what_to_do(folder: Path) -> None:
    pack_in(Path(shutil.copytree(folder / "tiny", folder / "awq")), "awq")
    text = TUNED.replace("MODEL", "awq").replace("INTO", "requantized").replace("TARGET", "int4")
    (folder / "awq.yaml").write_text(text)
    done = qc("check", "awq.yaml", cwd=folder)
    assert done.code == 1
    assert done.err == (
        "error: model.layers.0.self_attn.q_proj.weight holds int4 with zeros, blocks of 16, and so do 13 more: as int4 it "
        "would be rounded twice\n"
        "  site   model.layers.0.self_attn.q_proj.weight/dequantize\n"
        "  fix    export to safetensors, or add the pass dequantize before the export, which then rounds to int4\n"
    )
