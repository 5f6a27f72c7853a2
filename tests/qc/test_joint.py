"""Compiling recipes of several models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qc
from graph.artifact import load
from graph.errors import QcError
from qc.compiling import plan
from qc.models import capture_all
from recipes.load import load as load_recipe
from tests.graph.tiny import checkpoint

RECIPE = """
models:
  encoder: {{model: {model}, kind: encoder, attention: bidirectional}}
  decoder: {{model: {model}}}
passes:
  - quantize-base: {{scheme: nf4, block: 32}}
    on: "*"
  - add-lora: {{set: encoder, rank: 2}}
    on: encoder
  - insert-gca: {{start: 0, every_n: 1}}
    on: decoder
"""
JOIN = "  - attach-memory: {}\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("model"))


def recipe(folder: Path, model: Path, more: str) -> Path:
    file = folder / "joint.yaml"
    file.write_text(RECIPE.format(model=model) + more)
    return file


def test_two_models_become_one_artifact(tmp_path: Path, model: Path) -> None:
    made = qc.compile(recipe(tmp_path, model, JOIN), runs=tmp_path / "runs")
    graph = load(made.folder).graph
    assert graph.blocks == 4
    assert {name.partition(".")[0] for name in graph.tensors()} == {"encoder", "decoder"}
    assert {info.group for info in graph.tensors().values() if info.trainable} == {"gca", "lora.encoder"}
    assert graph.site("encoder.model/attention_mask").node.args[1] == "bidirectional"
    ran = [(report["pass"], report.get("on")) for report in made.manifest["reports"]]
    assert ran == [
        ("quantize-base", "encoder"),
        ("quantize-base", "decoder"),
        ("add-lora", "encoder"),
        ("insert-gca", "decoder"),
        ("attach-memory", None),
    ]
    start = (made.folder / "passes/00-start.txt").read_text()
    assert start.startswith("# encoder\ninput_ids: i64[B, T]\n")
    assert "\n# decoder\n" in start


def test_a_plan_of_two_models_is_the_graph_that_is_compiled(tmp_path: Path, model: Path) -> None:
    planned, errors = plan(load_recipe(recipe(tmp_path, model, JOIN)))
    assert not errors
    made = qc.compile(recipe(tmp_path, model, JOIN), runs=tmp_path / "runs")
    assert str(planned) == str(made.graph)


def test_models_that_are_never_joined_are_told(tmp_path: Path, model: Path) -> None:
    with pytest.raises(QcError) as caught:
        qc.compile(recipe(tmp_path, model, ""), runs=tmp_path / "runs")
    assert str(caught.value) == (
        "the recipe ends with several graphs: encoder, decoder\n  fix    add attach-memory, which makes one of them"
    )


def test_stages_may_start_from_the_same_one(tmp_path: Path, model: Path) -> None:
    stages = f"""
model: {model}
stages:
  - name: packed
    passes: [{{quantize-base: {{scheme: int8}}}}]
  - name: dequantized
    passes: [{{swap-base: {{}}}}]
  - name: full
    start: packed
    passes: [{{swap-base: {{to: full}}}}]
"""
    file = tmp_path / "stages.yaml"
    file.write_text(stages)
    planned, errors = plan(load_recipe(file))
    assert not errors
    qc.run(file, runs=tmp_path / "runs")
    (run,) = (tmp_path / "runs" / "stages").iterdir()
    packed, dequantized, full = (load(run / name / "compiled").graph for name in ("packed", "dequantized", "full"))
    assert str(planned) == str(full) == str(dequantized)
    name = "model.layers.0.mlp.up_proj.weight"
    assert f"{name}.indices" in packed.tensors()
    apart = (full.tensor(name) - dequantized.tensor(name)).abs().max()
    assert 0 < apart < 0.02


def test_a_model_that_is_named_twice_is_captured_once_and_trains_apart(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import graph as graphs

    captured: list[Any] = []
    capture = graphs.capture

    def counted(model: Any, **options: Any) -> Any:
        captured.append(model)
        return capture(model, **options)

    monkeypatch.setattr("graph.capture", counted)
    for whole in (True, False):
        captured.clear()
        found = capture_all(load_recipe(recipe(tmp_path, model, JOIN)), plan=not whole)
        assert len(captured) == 1
        encoder, decoder = found["encoder"].materialize(), found["decoder"].materialize()
        name = "model.layers.0.mlp.up_proj.weight"
        encoder.set_info(name, trainable=True)
        assert not decoder.info(name).trainable
        encoder.verify()
        decoder.verify()
        if whole:
            before = decoder.tensor(name).clone()
            with torch.no_grad():
                encoder.tensor(name).add_(1)
            assert torch.equal(decoder.tensor(name), before)
