"""Layer by layer: what trains when, towards what, and what a resumed training does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from graph import Graph, QcError, Selector
from graph.formats import LutOptions
from graph.layers import function_of, layers
from graph.weights import read_header
from passes.add_lora import AddLora
from passes.quantize_base import QuantizeBase
from passes.ste_fp16 import SteFp16
from runtimes.settings import Backtrack, Kd, Layerwise, TextFiles
from runtimes.train.layerwise import Layers, local_loss
from runtimes.train.metrics import read
from tests.runtimes.train.test_resume import Stop, StopAt
from tests.runtimes.train.tiny import corpus, run, settings, tiny_graph


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TextFiles:
    return corpus(tmp_path_factory.mktemp("text"))


BY_LAYER = Layerwise(steps_per_layer=3)


def lut_graph() -> Graph:
    graph = tiny_graph("no such tensor")
    QuantizeBase(scheme="lut", lut=LutOptions(bits=2, rank=4, group=8)).run(graph)
    graph.verify()
    return graph


def chosen(data: TextFiles, **changes: Any) -> Any:
    how: dict[str, Any] = {
        "steps": 14,
        "lr": 1e-2,
        "objective": Kd(),
        "layerwise": BY_LAYER,
        "save_every": 1,
        "keep": 99,
    }
    return settings(data, **(how | changes))


def trained_in(folder: Path, step: int, data: dict[int, Any]) -> set[str]:
    """The layers whose tensors differ between two checkpoints."""
    before, after = (read_header(folder / f"checkpoints/step-{n}/trained.safetensors") for n in (step - 1, step))
    moved = [name for name in after if not torch.equal(after[name].load(), before[name].load())]
    return {".".join(name.split(".")[1:4]) for name in moved}


def test_one_layer_trains_after_the_other_and_then_all(tmp_path: Path, data: TextFiles) -> None:
    graph = lut_graph()
    report = run(graph, chosen(data), tmp_path, teacher=tiny_graph())
    rows = read(tmp_path)
    assert [row["layerwise/layer"] for row in rows] == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 0, 0]
    expected = {2: {"layers.0.mlp"}, 5: {"layers.1.mlp"}, 7: {"layers.0.self_attn"}, 12: {"layers.1.self_attn"}}
    assert {step: trained_in(tmp_path, step, {}) for step in expected} == expected
    assert len(trained_in(tmp_path, 14, {})) == 4
    for row in rows[:12]:
        assert row["loss"] == pytest.approx(0.5 * row["loss/local"] + 0.5 * row["loss/objective"], rel=1e-5)
    assert "loss/local" not in rows[-1]
    assert report.steps == 14


def test_each_layer_has_the_whole_schedule_and_an_optimizer_of_its_own(tmp_path: Path, data: TextFiles) -> None:
    run(lut_graph(), chosen(data), tmp_path, teacher=tiny_graph())
    rates = [row["lr/all"] for row in read(tmp_path)]
    assert rates[:3] == rates[3:6] == rates[9:12]
    assert rates[0] == rates[12] == 1e-2
    steps = {}
    for number in (3, 4, 12, 14):
        found = read_header(tmp_path / f"checkpoints/step-{number}/optimizer.safetensors")
        steps[number] = sorted({int(value.load()) for key, value in found.items() if key.endswith("/step")})
    assert steps == {3: [3], 4: [1, 3], 12: [], 14: [2]}


def test_training_layers_lowers_what_each_is_off(tmp_path: Path, data: TextFiles) -> None:
    how = chosen(data, steps=40, layerwise=Layerwise(steps_per_layer=10, kd=0.0, local=1.0))
    run(lut_graph(), how, tmp_path, teacher=tiny_graph())
    rows = read(tmp_path)
    for start in (0, 10, 20, 30):
        assert rows[start + 9]["loss/local"] < 0.95 * rows[start]["loss/local"]


@pytest.mark.parametrize("at", [4, 7, 13])
def test_a_resumed_training_ends_in_the_same_bytes(tmp_path: Path, data: TextFiles, at: int) -> None:
    from runtimes.train import train
    from tests.runtimes.data.byte_tokenizer import byte_tokenizer

    how = chosen(data, steps=20, layerwise=replace(BY_LAYER, backtrack=Backtrack(ratio=1e-3, limit=1)), save_every=2)
    whole = run(lut_graph(), how, tmp_path / "whole", teacher=tiny_graph())
    with pytest.raises(Stop):
        train(
            lut_graph(),
            how,
            tokenizer=byte_tokenizer(),
            folder=tmp_path / "cut",
            progress=StopAt(at),
            teacher=tiny_graph(),
        )
    cut = run(lut_graph(), how, tmp_path / "cut", teacher=tiny_graph())
    assert cut.resumed_from > 0
    assert cut.sha256 == whole.sha256
    kept = [{k: v for k, v in row.items() if "second" not in k} for row in read(tmp_path / "cut")]
    assert kept == [{k: v for k, v in row.items() if "second" not in k} for row in read(tmp_path / "whole")]
    assert max(row["layerwise/backtracks"] for row in kept) > 0


# -- which layer ----------------------------------------------------------------------------------------------------


def schedule(steps: int, **how: Any) -> Layers:
    graph = lut_graph()
    found = [layer for kind in ("mlp", "attn") for layer in layers(graph, kind)]
    trained = [name for name, info in graph.tensors().items() if info.trainable]
    return Layers(Layerwise(steps_per_layer=2, **how), found, trained, steps)


def played(plan: Layers, losses: list[float]) -> list[str | None]:
    shown = []
    for step, loss in enumerate(losses, 1):
        shown.append(plan.current)
        plan.after(step, loss)
    return shown


def test_a_layer_that_starts_badly_has_the_one_before_it_trained_again() -> None:
    plan = schedule(20, backtrack=Backtrack(ratio=10, limit=2))
    shown = played(plan, [1.0, 0.5, 5.1, 0.6, 0.4, 4.1, 0.6, 0.3, 3.1, 0.2])
    assert shown == ["mlp.0", "mlp.0", "mlp.1", "mlp.0", "mlp.0", "mlp.1", "mlp.0", "mlp.0", "mlp.1", "mlp.1"]
    assert plan.backtracks == [0, 2, 0, 0]
    assert plan.current == "attn.0"


def test_what_is_trained_again_asks_for_nothing_itself_and_the_first_has_none_before_it() -> None:
    plan = schedule(30, backtrack=Backtrack(ratio=1, limit=1))
    assert played(plan, [9.0, 0.1, 0.05, 0.01, 5.0, 5.0, 0.02, 0.1]) == [
        "mlp.0", "mlp.0", "mlp.1", "mlp.1", "attn.0", "mlp.1", "mlp.1", "attn.0"
    ]  # fmt: skip


def test_without_steps_to_spare_nothing_is_trained_again() -> None:
    assert played(schedule(8, backtrack=Backtrack(ratio=1)), [1.0, 0.5, 9.0, 9.0])[-1] == "mlp.1"
    assert played(schedule(10, backtrack=Backtrack(ratio=1)), [1.0, 0.5, 9.0, 9.0])[-1] == "mlp.1"
    assert played(schedule(11, backtrack=Backtrack(ratio=1)), [1.0, 0.5, 9.0, 9.0])[-1] == "mlp.0"


# -- a layer and its loss -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mlp", "attn", "blocks"])
def test_a_layer_by_itself_computes_what_it_does_in_the_graph(kind: Any) -> None:
    graph = tiny_graph()
    found = layers(graph, kind)
    assert [layer.name for layer in found] == [f"{'block' if kind == 'blocks' else kind}.{n}" for n in range(2)]
    ids, probe = torch.randint(0, 264, (2, 9)), graph.copy()
    ends = [node for layer in layers(probe, kind) for node in (layer.x, layer.y)]
    probe.set_outputs(ends)
    probe.verify()
    values = probe(input_ids=ids)
    for layer, x, y in zip(found, values[::2], values[1::2], strict=True):
        again = function_of(graph, layer)(x, input_ids=ids, attention_mask=torch.ones_like(ids))
        assert torch.equal(again, y)


def test_what_belongs_to_a_linear_belongs_to_its_layer() -> None:
    graph = tiny_graph()
    SteFp16().run(graph)
    AddLora(select=Selector(role=("mlp.*", "attn.*"))).run(graph)
    graph.verify()
    mlp = layers(graph, "mlp")[1]
    assert {name.split(".")[-3] for name in mlp.tensors() if "lora" in name} >= {"lora_A", "lora_B"}
    assert "model.layers.1.mlp.down_proj.lora_B.default.weight" in mlp.tensors()
    assert all(name.startswith("model.layers.1.mlp.") for name in mlp.tensors())


def test_the_local_loss_is_that_of_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    y, t = (torch.randn(2, 5, 8, generator=generator) for _ in range(2))
    counts = torch.tensor([[True] * 3 + [False] * 2, [False] * 4 + [True]])
    rows, wanted = y[counts].double(), t[counts].double()
    normed = [v / (v.square().mean(1, keepdim=True) + 1e-6).sqrt() for v in (rows, wanted)]
    mse = torch.nn.functional.mse_loss
    expected = 0.8 * mse(normed[0], normed[1]) + 0.2 * mse(rows, wanted) / wanted.square().mean()
    assert float(local_loss(y, t, counts)) == pytest.approx(float(expected), rel=1e-5)
    assert float(local_loss(t, t, counts)) == 0
    assert float(local_loss(y, t, torch.zeros(2, 5, dtype=torch.bool))) == 0


# -- errors ---------------------------------------------------------------------------------------------------------


def test_a_local_loss_that_is_no_number_names_its_layer(tmp_path: Path, data: TextFiles) -> None:
    graph, teacher = lut_graph(), tiny_graph()
    name = "model.layers.1.mlp.down_proj.weight"
    teacher.set_tensor(name, teacher.tensor(name) * 1e38)
    with pytest.raises(QcError) as caught:
        run(graph, chosen(data, layerwise=replace(BY_LAYER, kd=0.0)), tmp_path, teacher=teacher)
    assert str(caught.value).splitlines()[0] in [f"the local loss of mlp.1 is {v} at step 4" for v in ("nan", "inf")]


def test_too_few_steps_are_an_error() -> None:
    with pytest.raises(QcError) as caught:
        schedule(7)
    assert str(caught.value) == (
        "layer by layer takes 4 x 2 steps, not 7\n  fix    set train.steps to 8 or more, or lower steps_per_layer"
    )


def test_a_tensor_that_no_layer_trains_is_an_error_unless_steps_are_left() -> None:
    graph = lut_graph()
    graph.set_info("model.norm.weight", trainable=True)
    trained = [name for name, info in graph.tensors().items() if info.trainable]
    found = [layer for kind in ("mlp", "attn") for layer in layers(graph, kind)]
    with pytest.raises(QcError) as caught:
        Layers(Layerwise(steps_per_layer=2), found, trained, 8)
    assert str(caught.value) == (
        "no layer trains model.norm.weight\n"
        "  fix    freeze it with set-trainable, or give train.steps some more, which train all"
    )
    Layers(Layerwise(steps_per_layer=2), found, trained, 9)


def test_a_layer_without_trainable_tensors_and_a_missing_teacher_are_errors(tmp_path: Path, data: TextFiles) -> None:
    graph = tiny_graph("mlp")
    with pytest.raises(QcError, match=r"nothing in attn\.0 is trainable"):
        run(graph, chosen(data), tmp_path, teacher=tiny_graph())
    from runtimes.settings import CausalLm

    with pytest.raises(QcError, match="training layer by layer needs a teacher, and none was given"):
        run(lut_graph(), chosen(data, objective=CausalLm()), tmp_path)
