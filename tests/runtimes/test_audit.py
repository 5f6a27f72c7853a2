"""Gradients that are missing, broken or wrong are found and named; levels of text are what they say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from graph import Graph, QcError
from graph.ops import op
from passes.add_lora import AddLora
from passes.freeze_ternary import FreezeTernary
from passes.runner import apply
from passes.ternary_ste import TernarySte
from runtimes.assess.assess import accuracy, assess
from runtimes.assess.audit import audit
from runtimes.assess.levels import Level, by_loss, corrupted
from runtimes.data import Batch
from tests.runtimes.train.tiny import tiny_graph


@pytest.fixture(scope="module")
def batch() -> Batch:
    ids = torch.randint(0, 264, (8, 24), generator=torch.Generator().manual_seed(0))
    return Batch(ids, torch.ones_like(ids), torch.cat([ids[:, 1:], torch.full((8, 1), -100)], dim=1))


def test_everything_that_trains_gets_the_gradient_that_the_loss_has(tmp_path: Path, batch: Batch) -> None:
    found = audit(tiny_graph(""), batch, folder=tmp_path, spots=6)
    assert found.passed, found.said()
    assert len(found.differences) == 6 and not found.straight
    assert found.figures() == {
        "gradient_flow/passed": 1.0, "gradient_flow/tensors": len(found.norms), "gradient_flow/dead": 0,
    }  # fmt: skip


def test_a_frozen_ternary_graph_passes_gradients_to_lora_and_norms(tmp_path: Path, batch: Batch) -> None:
    graph = tiny_graph("norm")
    apply(TernarySte(act_bits=8), graph, check=False)
    apply(FreezeTernary(), graph, check=False)
    found = audit(graph, batch, folder=tmp_path, spots=4)
    assert found.passed, found.said()
    assert all("norm" in name for name in found.norms)
    adapted = tiny_graph("no such tensor")
    apply(TernarySte(), adapted, check=False)
    apply(FreezeTernary(), adapted, check=False)
    apply(AddLora(rank=2), adapted, check=False)
    for name, info in adapted.tensors().items():
        if info.trainable and "lora_B" in name:
            adapted.set_tensor(name, torch.randn(adapted.shape(name), generator=torch.Generator().manual_seed(1)) * 0.1)
    found = audit(adapted, batch, folder=tmp_path)
    assert found.passed, found.said()


def test_latent_weights_are_read_through_a_rounding_and_have_no_difference(tmp_path: Path, batch: Batch) -> None:
    graph = tiny_graph("norm")
    apply(TernarySte(), graph, check=False)
    found = audit(graph, batch, folder=tmp_path, spots=99)
    assert found.passed, found.said()
    assert found.straight and all(name.endswith(".latent") for name in found.straight)
    assert found.differences and {one.name for one in found.differences} <= set(found.norms) - set(found.straight)
    assert found.said().endswith(
        f"{len(found.straight)} tensors are read through a rounding, which has no difference to compare"
    )


def test_new_lora_has_dead_halves_and_they_are_named(tmp_path: Path, batch: Batch) -> None:
    graph = tiny_graph("no such tensor")
    apply(AddLora(rank=2), graph, check=False)
    found = audit(graph, batch, folder=tmp_path)
    assert not found.passed
    assert found.dead and all("lora_A" in name for name in found.dead), "B is zero, so A gets no gradient yet"
    assert f"no gradient: {found.dead[0]}" in found.said()


class _Doubled(torch.autograd.Function):
    """A gradient that is twice what it should be."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad * 2


class _Broken(_Doubled):
    """A gradient that is no number."""

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad * float("nan")


@op
def doubled_gradient(x: Tensor) -> Tensor:
    """x, with a wrong gradient."""
    return _Doubled.apply(x)


@op
def broken_gradient(x: Tensor) -> Tensor:
    """x, with no gradient to speak of."""
    return _Broken.apply(x)


def through(graph: Graph, name: str, what: Callable[[Tensor], Tensor]) -> Graph:
    """The graph, its reader of ``name`` reading it through an op."""
    reader = next(n for n in graph.module.graph.nodes if n.op == "get_attr" and n.target == name)
    users = list(reader.users)
    node = graph.insert(what, reader, name="through", before=users[0])
    for user in users:
        user.replace_input_with(reader, node)
    graph.verify()
    return graph


def test_a_wrong_gradient_is_found_by_the_difference(tmp_path: Path, batch: Batch) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    found = audit(through(tiny_graph("layers.0.mlp.up"), name, doubled_gradient), batch, folder=tmp_path)
    (one,) = found.differences
    assert not found.passed and not found.dead
    assert one.measured == pytest.approx(one.gradient / 2, rel=0.02)
    assert found.said().endswith("not what the loss has")


def test_a_gradient_that_is_not_finite_is_named(tmp_path: Path, batch: Batch) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    found = audit(through(tiny_graph("layers.0.mlp.up"), name, broken_gradient), batch, folder=tmp_path)
    assert found.broken == (name,) and not found.passed
    assert found.figures()["gradient_flow/dead"] == 1


def test_where_nothing_trains_there_is_nothing_to_audit(tmp_path: Path, batch: Batch) -> None:
    with pytest.raises(QcError) as caught:
        audit(tiny_graph("no such tensor"), batch, folder=tmp_path)
    assert str(caught.value) == (
        "nothing in the graph trains\n  fix    say what does with set-trainable, or train: of a pass"
    )


def test_corruption_replaces_what_is_read_and_keeps_what_is_to_be_predicted(batch: Batch) -> None:
    levels = corrupted([batch], 4, 264)
    shares = [float((level.batches[0].input_ids != batch.input_ids).double().mean()) for level in levels]
    assert shares[0] == 0 and shares == sorted(shares)
    assert shares[2] == pytest.approx(0.5, abs=0.12)
    assert all(level.batches[0].labels.equal(batch.labels) for level in levels)
    assert levels[3].batches[0].input_ids.equal(corrupted([batch], 4, 264)[3].batches[0].input_ids)


def test_rows_are_sorted_by_loss_and_cut_into_equal_levels(batch: Batch) -> None:
    levels = by_loss([batch], [3.0, 1.0, 8.0, 2.0, 5.0, 4.0, 7.0, 6.0], 4)
    assert [len(level.batches) for level in levels] == [2, 2, 2, 2]
    assert levels[0].name == "loss 1.00 to 2.00"
    assert levels[3].batches[1].input_ids.equal(batch.input_ids[2:3])


def test_every_level_has_an_accuracy_and_the_noise_of_its_gradients(tmp_path: Path, batch: Batch) -> None:
    graph = tiny_graph("no such tensor")
    found = assess(graph, corrupted([batch], 3, 264), target=0.75, tolerance=0.05, micro_batches=8, folder=tmp_path)
    assert found.levels[0].accuracy == accuracy(graph, batch)[0] / (8 * 23)
    assert all(one.gradients.batches == 8 and one.gradients.noise_scale > 0 for one in found.levels)
    assert found.crossing.said.startswith("no crossing: the easiest level, 1, is at ")
    assert found.figures() == {"assess/level": 0.0, "assess/crossed": 0.0}
    found.write(tmp_path)
    assert '"said": "no crossing' in (tmp_path / "assess.json").read_text()


def test_a_level_of_too_few_rows_is_refused(tmp_path: Path, batch: Batch) -> None:
    few = Batch(*(t[:3] for t in (batch.input_ids, batch.attention_mask, batch.labels)))
    with pytest.raises(QcError) as caught:
        assess(tiny_graph(), [Level("all", (few,))], target=0.7, tolerance=0.1, micro_batches=8, folder=tmp_path)
    assert str(caught.value) == (
        "level 'all' has 3 rows, fewer than the 8 batches that gradients are compared over\n"
        "  fix    give more batches of text, or fewer levels"
    )
