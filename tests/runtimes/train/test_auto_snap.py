"""auto_snap: magnitudes that come to rest are rounded and frozen, and nothing else notices."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from graph import Graph, QcError, Selector
from graph.formats import LutOptions
from graph.weights import read_header
from passes.quantize_base import QuantizeBase
from passes.set_trainable import SetTrainable
from passes.snap import Snap
from runtimes.settings import AutoSnap, Group, Kd, TextFiles
from runtimes.train.auto_snap import relative_change
from runtimes.train.metrics import read
from tests.runtimes.train.test_resume import Stop, StopAt
from tests.runtimes.train.tiny import corpus, run, settings, tiny_graph


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TextFiles:
    return corpus(tmp_path_factory.mktemp("text"))


def lut_graph() -> Graph:
    graph = tiny_graph("no such tensor")
    QuantizeBase(scheme="lut", lut=LutOptions(bits=2, rank=4, group=8)).run(graph)
    graph.verify()
    return graph


def magnitudes(graph: Graph) -> dict[str, torch.Tensor]:
    return {name: graph.tensor(name) for name in graph.tensors() if name.endswith(".scale_g")}


def on_grid(value: torch.Tensor) -> bool:
    return torch.equal(value.half().float(), value)


RESTS = AutoSnap(every=2, threshold=1.0, patience=2)  # after looks at 2, 4 and 6


def train(graph: Graph, data: TextFiles, folder: Path, **changes: Any) -> Any:
    chosen: dict[str, Any] = {"steps": 12, "lr": 2e-3, "auto_snap": RESTS, "save_every": 2, "keep": 9}
    return run(graph, settings(data, **(chosen | changes)), folder)


def test_magnitudes_that_rest_are_rounded_and_frozen_once_and_the_rest_trains_on(
    tmp_path: Path, data: TextFiles
) -> None:
    graph = lut_graph()
    report = train(graph, data, tmp_path)
    rows = read(tmp_path)
    assert [row["auto_snap/frozen"] for row in rows] == [0.0] * 5 + [1.0] * 7
    assert [row["step"] for row in rows if "auto_snap/change" in row] == [4, 6]
    assert [row["auto_snap/resting"] for row in rows if "auto_snap/resting" in row] == [1, 2]
    at = {n: read_header(tmp_path / f"checkpoints/step-{n}/trained.safetensors") for n in (4, 6, 12)}
    for name, value in magnitudes(graph).items():
        assert on_grid(value)
        assert not on_grid(at[4][name].load())
        assert torch.equal(at[6][name].load(), value)
        assert not graph.info(name).trainable
    moved = [name for name in at[6] if not torch.equal(at[6][name].load(), at[12][name].load())]
    assert sorted({name.rpartition(".")[2] for name in moved}) == ["scale_a", "scale_b"]
    assert len(moved) == 2 * len(magnitudes(graph)) == 28
    assert not report.notes
    table = next(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert {"auto_snap/change", "auto_snap/resting", "auto_snap/frozen"} <= set(table)


def test_the_others_lose_nothing_of_what_the_optimizer_remembers(tmp_path: Path, data: TextFiles) -> None:
    train(lut_graph(), data, tmp_path / "snapped")
    train(lut_graph(), data, tmp_path / "free", auto_snap=None)
    snapped, free = (
        read_header(tmp_path / kind / "checkpoints/step-6/optimizer.safetensors") for kind in ("snapped", "free")
    )
    assert snapped.keys() == free.keys()
    assert all(torch.equal(snapped[key].load(), free[key].load()) for key in snapped)
    later = read_header(tmp_path / "snapped/checkpoints/step-8/optimizer.safetensors")
    steps = {key.rpartition(".")[2]: int(value.load()) for key, value in later.items() if key.endswith("/step")}
    assert steps == {"scale_a/step": 8, "scale_b/step": 8, "scale_g/step": 6}


@pytest.mark.parametrize("at", [5, 9])
def test_a_resumed_training_snaps_as_the_whole_one_did(tmp_path: Path, data: TextFiles, at: int) -> None:
    from runtimes.train import train as start
    from tests.runtimes.data.byte_tokenizer import byte_tokenizer

    chosen = settings(data, steps=10, lr=2e-3, auto_snap=RESTS, save_every=2, ema=0.8)
    whole = run(lut_graph(), chosen, tmp_path / "whole")
    with pytest.raises(Stop):
        start(lut_graph(), chosen, tokenizer=byte_tokenizer(), folder=tmp_path / "cut", progress=StopAt(at))
    graph = lut_graph()
    cut = run(graph, chosen, tmp_path / "cut")
    assert cut.resumed_from > 0
    assert cut.sha256 == whole.sha256
    kept = [{k: v for k, v in row.items() if "second" not in k} for row in read(tmp_path / "cut")]
    assert kept == [{k: v for k, v in row.items() if "second" not in k} for row in read(tmp_path / "whole")]
    assert all(on_grid(value) for value in magnitudes(graph).values())  # those of the average


def test_rounding_them_moves_the_divergence_from_the_teacher_by_less_than_a_hundredth(
    tmp_path: Path, data: TextFiles
) -> None:
    """T15. The training stops with the step that freezes them; another, without auto_snap, does all but that."""
    losses = {}
    for kind, snap in (("free", None), ("frozen", AutoSnap(every=2, threshold=1.0, patience=2))):
        graph, teacher = lut_graph(), tiny_graph()
        chosen = settings(data, steps=7, lr=2e-3, objective=Kd(temperature=2.0), auto_snap=snap)
        run(graph, chosen, tmp_path / kind, teacher=teacher)
        losses[kind] = read(tmp_path / kind)[-1]["loss"]  # the loss of step 7, which is that of what step 6 left
    assert losses["free"] != losses["frozen"]
    assert losses["frozen"] == pytest.approx(losses["free"], rel=0.01)


def test_they_stay_free_while_they_move_and_the_end_says_so(tmp_path: Path, data: TextFiles) -> None:
    graph = lut_graph()
    report = train(graph, data, tmp_path, auto_snap=AutoSnap(every=2, threshold=1e-9, patience=1))
    assert report.notes == ("auto_snap: nothing was rounded, for it never came to rest",)
    assert read(tmp_path)[-1]["auto_snap/frozen"] == 0
    assert all(graph.info(name).trainable for name in magnitudes(graph))


def test_nothing_rests_before_its_group_has_begun(tmp_path: Path, data: TextFiles) -> None:
    groups = {"g": Group(lr=1e-3, select=Selector(name="*.scale_g"), start_step=5), "rest": Group(lr=1e-3)}
    train(lut_graph(), data, tmp_path, lr=None, groups=groups)
    assert [row["step"] for row in read(tmp_path) if "auto_snap/change" in row] == [9, 11]


def test_a_selection_without_a_trained_tensor_is_an_error(tmp_path: Path, data: TextFiles) -> None:
    graph = lut_graph()
    SetTrainable(groups={"ab": Selector(name=("*.scale_a", "*.scale_b"))}).run(graph)
    with pytest.raises(QcError) as caught:
        train(graph, data, tmp_path)
    assert str(caught.value).splitlines()[0] == "auto_snap: select {name: *.scale_g} matches no trainable tensor"


def test_the_change_is_relative_to_each_value_down_to_a_thousandth_of_the_largest() -> None:
    old = torch.tensor([100.0, 1.0, 0.0])
    assert relative_change(old, torch.tensor([101.0, 1.0, 0.0])) == pytest.approx(0.01)
    assert relative_change(old, torch.tensor([100.0, 1.5, 0.0])) == pytest.approx(0.5)
    assert relative_change(old, torch.tensor([100.0, 1.0, 0.001])) == pytest.approx(0.01)
    assert relative_change(torch.zeros(2), torch.zeros(2)) == 0


def test_magnitudes_are_frozen_from_the_start_by_two_passes(tmp_path: Path, data: TextFiles) -> None:
    """freeze-mags: on the grid before the first step, and never off it."""
    graph = lut_graph()
    Snap(select=Selector(name="*.scale_g")).run(graph)
    SetTrainable(groups={"scales": Selector(name=("*.scale_a", "*.scale_b"))}).run(graph)
    before = {name: value.clone() for name, value in magnitudes(graph).items()}
    assert all(on_grid(value) for value in before.values())
    train(graph, data, tmp_path, auto_snap=None)
    assert all(torch.equal(value, before[name]) for name, value in magnitudes(graph).items())
