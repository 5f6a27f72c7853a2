"""qc from Python: values instead of text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import qc
from qc.console import GateFailed
from qc.measuring import check_gates
from qc.runs import Run
from recipes.load import load as load_recipe
from recipes.settings import Gate

RECIPE = """
model: tiny
stages:
  - name: tune
    passes:
      - quantize-base: {scheme: nf4}
      - add-lora: {rank: 2, alpha: 4}
        name: lora
    train: {data: {text: corpus/*.txt}, steps: 2, batch: 2, length: 16, lr: 1.0e-3, plot: false}
    evaluate: {metrics: [perplexity, top1], batches: 1, batch: 2, length: 16}
    require:
      - {metric: train/loss, op: finite}
      - {metric: bits_per_weight, op: <, value: 32}
  - name: merge
    passes:
      - merge-lora: {into: dequantized}
    require:
      - {metric: lora/survived, op: ">", value: 0.5}
      - {metric: export/psnr_db, op: ">=", value: 70}
    export:
      - {target: safetensors, dtype: fp16}
"""


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Path:
    """A recipe beside the tiny model."""
    path = folder / "api.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def steps(recipe: Path) -> Mapping[str, Mapping[str, Any]]:
    """The figures of ``qc.run``, by step."""
    return {one["step"]: one for one in qc.run(recipe, runs=recipe.parent / "api")}


def test_importing_qc_imports_nothing_else_and_lists_what_it_has() -> None:
    assert set(qc.__all__) <= set(dir(qc))
    with pytest.raises(AttributeError, match="qc has no 'quantise'"):
        _ = qc.quantise


def test_run_does_all_of_a_recipe_and_says_what_each_step_gave(steps: Mapping[str, Mapping[str, Any]]) -> None:
    assert list(steps) == [
        "start", "tune/compiled", "tune/trained", "merge/compiled", "merge/export safetensors fp16", "total",
    ]  # fmt: skip
    assert steps["tune/compiled"]["bits_per_weight"] < steps["start"]["bits_per_weight"]
    assert steps["merge/export safetensors fp16"]["export/psnr_db"] >= 70
    assert steps["total"]["seconds"] > 0


def test_an_export_loads_with_transformers_and_computes_what_the_graph_does(
    steps: Mapping[str, Mapping[str, Any]],
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(steps["merge/export safetensors fp16"]["folder"], dtype=torch.float32)
    ids = torch.tensor([[72, 101, 108, 108, 111]])
    compiled = _folder(steps, "merge/compiled")
    ours = qc.load(compiled).graph.materialize()(input_ids=ids, attention_mask=torch.ones_like(ids))
    with torch.no_grad():
        theirs = model(input_ids=ids).logits
    torch.testing.assert_close(theirs, ours, atol=2e-3, rtol=0)


def _folder(steps: Mapping[str, Mapping[str, Any]], step: str) -> Path:
    export = Path(steps["merge/export safetensors fp16"]["folder"])
    return export.parent.parent / step


def test_compile_takes_overrides_and_the_same_again_is_the_same_folder(
    recipe: Path, steps: Mapping[str, Mapping[str, Any]]
) -> None:
    runs, wanted = recipe.parent / "api", {"lora.rank": 3}
    artifact = qc.compile(recipe, set=wanted, runs=runs)
    assert artifact.graph.shape("model.layers.0.mlp.up_proj.lora_A.default.weight") == (3, 64)
    before = artifact.digest
    said: list[str] = []
    again = qc.compile(recipe, set=wanted, runs=runs, tell=said.append)
    assert (again.folder, again.digest) == (artifact.folder, before)
    assert said == [f"tune: compiled before: {artifact.folder}"]


def test_a_text_that_changed_is_compiled_anew(folder: Path, tmp_path: Path) -> None:
    text, recipe = tmp_path / "some.txt", tmp_path / "recipe.yaml"
    text.write_text("def a(b):\n    return b\n" * 20)
    passes = "[{calibrate: {data: {text: some.txt}, tokens: 64, length: 16}}]"
    recipe.write_text(f"model: {folder / 'tiny'}\npasses: {passes}\n")
    moments = "model.layers.0.mlp.up_proj.weight_moments"
    first = qc.compile(recipe, runs=tmp_path / "runs").graph.tensor(moments)
    said: list[str] = []
    qc.compile(recipe, runs=tmp_path / "runs", tell=said.append)
    assert said[0].startswith("compiled before: ")
    text.write_text("class B(a):\n    pass\n" * 30)
    assert not torch.equal(qc.compile(recipe, runs=tmp_path / "runs").graph.tensor(moments), first)


def test_a_trained_set_is_saved_as_peft_has_it(folder: Path, steps: Mapping[str, Mapping[str, Any]]) -> None:
    graph = qc.load(_folder(steps, "tune/trained")).graph
    folder = qc.save_adapter(graph, folder / "adapter")
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 2
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        found = file.get_tensor("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight")
    assert torch.equal(found, graph.tensor("model.layers.0.mlp.up_proj.lora_A.default.weight"))


def test_generate_goes_on_from_a_prompt(steps: Mapping[str, Mapping[str, Any]]) -> None:
    compiled = _folder(steps, "merge/compiled")
    once, twice = (qc.generate(compiled, "ab", max_tokens=4) for _ in range(2))
    assert once == twice


def test_export_writes_the_dtype_that_it_is_told(folder: Path, steps: Mapping[str, Mapping[str, Any]]) -> None:
    out = folder / "out"
    assert qc.export(_folder(steps, "merge/compiled"), target="safetensors", out=out, dtype="bf16", verify=False) == out
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    with safe_open(out / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_mistakes_are_raised_as_they_are_told_on_the_command_line(recipe: Path) -> None:
    with pytest.raises(qc.QcError) as caught:
        qc.compile(recipe, set={"lora.rnak": 3}, runs=recipe.parent / "api")
    assert str(caught.value) == "add-lora has no 'rnak'\n  recipe --set lora.rnak=3\n  fix    did you mean 'rank'?"
    with pytest.raises(qc.QcError, match="lies in no run"):
        qc.train(qc.Artifact(recipe.parent / "tiny", None, {}))  # type: ignore[arg-type]


GATES = [
    (Gate(metric="lora/survived", op="<", value=0.1), "lora/survived < 0.1 fails: it is 1"),
    (Gate(metric="export/psnr_db", op="<", value=10), "export/psnr_db < 10 fails: it is "),
    (Gate(metric="bytes", op="<", value=1), "bytes < 1 fails: it is "),
    (Gate(metric="bits_per_weight", op="<", value=1), "bits_per_weight < 1 fails: it is "),
]


@pytest.mark.parametrize(("gate", "said"), GATES, ids=[gate.metric for gate, _ in GATES])
def test_a_gate_fails_on_the_figure_of_its_stage(
    gate: Gate, said: str, recipe: Path, steps: Mapping[str, Mapping[str, Any]]
) -> None:
    compiled = _folder(steps, "merge/compiled")
    stage = load_recipe(recipe).plan()[1]
    with pytest.raises(GateFailed) as caught:
        check_gates(Run(compiled.parent.parent), stage, [gate], compiled, tell=lambda message: None)
    assert caught.value.what.startswith(said)
