"""A small language model: what ternary weights cost, what training recovers, and what is left after a hand-off."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from graph import Graph, Selector
from passes.freeze_ternary import FreezeTernary
from passes.hand_off import HandOff
from passes.requantize_ternary import RequantizeTernary
from passes.runner import apply
from passes.set_trainable import SetTrainable
from passes.ternary_ste import TernarySte
from runtimes.settings import Kd, TextFiles
from runtimes.train import Silent, train
from tests.runtimes.data.byte_tokenizer import byte_tokenizer
from tests.runtimes.train.tiny import corpus, settings, tiny_graph

pytestmark = pytest.mark.slow

RULE: dict[str, Any] = {"tau": 0.5, "scale": "least-squares"}


def trained(graph: Graph, folder: Path, data: TextFiles, steps: int, lr: float, **options: Any) -> float:
    """The loss on held-out text after so many steps; the graph is trained in place."""
    teacher = options.pop("teacher", None)
    chosen = settings(data, steps=steps, lr=lr, batch=8, length=48, eval_batches=8, **options)
    report = train(graph, chosen, tokenizer=byte_tokenizer(), folder=folder, progress=Silent(), teacher=teacher)
    assert report.eval_perplexity is not None
    return math.log(report.eval_perplexity)


def loss(graph: Graph, folder: Path, data: TextFiles) -> float:
    """The loss on the same text, of a copy that a step of a vanishing rate leaves as it is."""
    copy = graph.copy()
    for name, info in copy.tensors().items():
        copy.set_tensor(name, copy.tensor(name).detach().clone())  # first: a copy has the tensors of the original
        copy.set_info(name, trainable=info.role == "norm" and info.kind == "parameter", group=None)
    return trained(copy, folder, data, 1, 1e-12)


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, float]:
    folder = tmp_path_factory.mktemp("recovery")
    data, found = corpus(folder / "text", files=120), dict[str, float]()
    model = tiny_graph("")
    found["full"] = trained(model, folder / "full", data, 300, 5e-3)
    longer = model.copy()
    for name in longer.tensors():
        longer.set_tensor(name, longer.tensor(name).detach().clone())
    found["control"] = trained(longer, folder / "control", data, 200, 2e-3)
    graph = model.copy()
    for name, info in graph.tensors().items():
        graph.set_tensor(name, graph.tensor(name).detach().clone())
        graph.set_info(name, trainable=False, group=None) if info.trainable else None
    apply(TernarySte(**RULE), graph, check=False)
    found["compiled"] = loss(graph, folder / "compiled", data)
    found["recovered"] = trained(graph, folder / "recovered", data, 200, 5e-3, objective=Kd(), teacher=model)
    apply(FreezeTernary(), graph, check=False)
    found["packed"] = loss(graph, folder / "packed", data)
    apply(HandOff(), graph, check=False)
    apply(SetTrainable(groups={"weights": Selector(name=("*",))}), graph, check=False)
    found["handed over"] = loss(graph, folder / "handed", data)
    naive = model.copy()
    for name in naive.tensors():
        naive.set_tensor(name, naive.tensor(name).detach().clone())
        naive.set_info(name, trainable=False, group=None) if naive.info(name).trainable else None
    apply(TernarySte(tau=0.1), naive, check=False)
    found["compiled by the mean"] = loss(naive, folder / "by the mean", data)
    found["recovered by the mean"] = trained(naive, folder / "mean", data, 200, 5e-3, objective=Kd(), teacher=model)
    again = {"stored": {"start": "stored"}, "least-squares": RULE | {"start": "plain"}, "naive": {"start": "plain"}}
    found["floats"] = trained(graph, folder / "floats", data, 100, 1e-3)
    for name, options in again.items():
        copy = graph.copy()
        for tensor in copy.tensors():
            copy.set_tensor(tensor, copy.tensor(tensor).detach().clone())
        apply(RequantizeTernary(**({"tau": 0.5} | options)), copy, check=False)
        found[name] = loss(copy, folder / name, data)
        if name == "least-squares":
            found["again"] = trained(copy, folder / "again", data, 100, 2e-3, objective=Kd(), teacher=graph)
    return found


def test_training_recovers_most_of_what_rounding_cost(losses: Mapping[str, float]) -> None:
    assert math.exp(losses["recovered"] - losses["full"]) <= 1.2, losses
    assert math.exp(losses["recovered"] - losses["control"]) <= 1.15, losses
    cost = losses["compiled"] - losses["full"]
    assert cost > 0.1 and losses["recovered"] - losses["full"] <= 0.1 * cost, losses


def test_with_scales_of_mean_magnitude_it_halves_the_perplexity_of_rounding_alone(losses: Mapping[str, float]) -> None:
    assert math.exp(losses["recovered by the mean"] - losses["full"]) <= 1.2, losses
    assert math.exp(losses["recovered by the mean"] - losses["compiled by the mean"]) <= 0.5, losses


def test_packing_and_handing_over_change_nothing(losses: Mapping[str, float]) -> None:
    assert losses["packed"] == pytest.approx(losses["recovered"], abs=2e-3)
    assert losses["handed over"] == pytest.approx(losses["packed"], abs=1e-4)


def test_a_return_that_keeps_scales_is_no_worse_than_before_the_hand_off_and_the_naive_one_is(
    losses: Mapping[str, float],
) -> None:
    assert losses["floats"] < losses["packed"]
    assert losses["naive"] > min(losses["stored"], losses["least-squares"]), losses
    assert losses["again"] <= losses["packed"], losses
    kept = (losses["packed"] - losses["again"]) / (losses["packed"] - losses["floats"])
    assert kept >= 0.36, f"{kept:.0%} of the gain is left: {losses}"
