"""What staged cross-attention looks at, as a part of the loss."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch

from graph import Graph, QcError
from graph.encoder import as_encoder
from passes.attach_memory import AttachMemory
from passes.insert_staged_gca import InsertStagedGca
from passes.runner import apply, link
from runtimes.settings import Group, Routing
from runtimes.train.routing import entropies
from tests.runtimes.train.joint import joint_graph, run
from tests.runtimes.train.tiny import tiny_graph

DOCUMENTS = torch.tensor([[1, 1, 2, 2], [1, 2, 2, 0]])
GROUPS = {"gca": Group(lr=2e-2)}


def staged_graph() -> Graph:
    decoder = tiny_graph("nothing")
    apply(InsertStagedGca(pairs=1, start=0, gap=1), decoder, check=False)
    return link(AttachMemory(), {"encoder": as_encoder(tiny_graph("nothing")), "decoder": decoder}, check=False)[0]


def test_entropies_are_of_documents_wherever_their_last_tokens_stand() -> None:
    weights = torch.tensor(
        [[[0.0, 0.5, 0.0, 0.5], [0.0, 1.0, 0.0, 0.0]], [[0.25, 0.0, 0.75, 0.0], [0.0, 0.0, 1.0, 0.0]]]
    )
    text = torch.tensor([[True, True], [True, False]])
    each, together = entropies([weights, DOCUMENTS], text)
    h = [math.log(2), 0.0, -0.25 * math.log(0.25) - 0.75 * math.log(0.75)]
    mean = (0.5 + 1.0 + 0.25) / 3
    assert float(each) == pytest.approx(sum(h) / 3, abs=1e-6)
    assert float(together) == pytest.approx(-mean * math.log(mean) - (1 - mean) * math.log(1 - mean), abs=1e-6)


def test_a_row_without_a_memory_counts_for_nothing() -> None:
    weights = torch.tensor([[[0.0, 0.5, 0.0, 0.5]], [[0.0, 0.0, 0.0, 0.0]]])
    alone = entropies([weights[:1], DOCUMENTS[:1]], torch.ones(1, 1, dtype=torch.bool))
    both = entropies([weights, DOCUMENTS * torch.tensor([[1], [0]])], torch.ones(2, 1, dtype=torch.bool))
    assert [float(x) for x in both] == pytest.approx([float(x) for x in alone])
    assert [float(x) for x in alone] == pytest.approx([math.log(2), math.log(2)])


def test_gradients_are_finite_where_a_document_has_no_weight() -> None:
    weights = torch.tensor([[[0.0, 1.0, 0.0, 0.0]]], requires_grad=True)
    each, together = entropies([weights, DOCUMENTS[:1]], torch.ones(1, 1, dtype=torch.bool))
    (grad,) = torch.autograd.grad(each - together, weights)
    assert grad.isfinite().all()


def test_sparsity_makes_every_position_look_at_few_documents(tmp_path: Path) -> None:
    last = {}
    for sparsity in (0.0, 50.0):
        folder = tmp_path / str(sparsity)
        routing = Routing(sparsity=sparsity, balance=0.0)
        run(staged_graph(), folder, groups=GROUPS, steps=12, routing=routing)
        rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
        assert set(rows[0]) >= {"loss/routing_sparsity", "loss/routing_balance"}
        assert float(rows[0]["loss/routing_sparsity"]) == pytest.approx(math.log(2), abs=0.1)
        last[sparsity] = float(rows[-1]["loss/routing_sparsity"])
    assert last[50.0] < 0.85 * last[0.0]


def test_the_terms_beside_the_loss_leave_what_is_logged_of_the_objective_as_it_is(tmp_path: Path) -> None:
    plain = run(staged_graph(), tmp_path / "plain", groups=GROUPS, steps=1)
    routed = run(staged_graph(), tmp_path / "routed", groups=GROUPS, steps=1, routing=Routing(sparsity=0, balance=0))
    assert routed.first_loss == plain.first_loss


def test_a_model_that_weighs_no_documents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QcError) as caught:
        run(joint_graph(), tmp_path / "training", routing=Routing())
    assert str(caught.value) == (
        "train has routing, and the model weighs no documents\n"
        "  fix    insert insert-staged-gca, or take routing out of train"
    )
