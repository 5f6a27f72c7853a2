from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from graph import Graph, QcError
from runtimes.data import Batch
from runtimes.settings import Kd
from runtimes.train.losses import Features
from runtimes.train.objectives import Distillation, cut_head, features, next_token
from tests.runtimes.train.tiny import tiny_graph


def scaled(graph: Graph) -> Graph:
    """The graph with its logits halved, as some models do: more than one linear at the end."""
    (head,) = graph.output_nodes()
    after = graph.module.graph.output_node()
    graph.set_outputs([graph.insert("aten.mul.Tensor", head, 0.5, name="halved", before=after)])
    graph.verify()
    return graph


def batch() -> Batch:
    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:]
    return Batch(ids, torch.ones_like(ids), labels)


@pytest.mark.parametrize("is_scaled", [False, True])
def test_the_loss_and_its_gradients_are_those_of_the_whole_logits_cut_or_not(is_scaled: bool) -> None:
    graph, taken = (scaled(tiny_graph("model")) if is_scaled else tiny_graph("model") for _ in range(2))
    for name, info in graph.tensors().items():
        if info.kind == "parameter":
            taken.set_tensor(name, graph.tensor(name))
    cut = cut_head(taken)
    taken.verify()
    assert cut == (not is_scaled)
    given = batch()
    inputs = {"input_ids": given.input_ids, "attention_mask": given.attention_mask}
    names = [name for name, info in graph.tensors().items() if info.trainable]
    wanted = F.cross_entropy(graph(**inputs).flatten(0, 1), given.labels.flatten(), reduction="sum")
    found = next_token(features(taken(**inputs), cut), given)
    torch.testing.assert_close(found, wanted)
    wanted_gradients = torch.autograd.grad(wanted, [graph.module.get_parameter(n) for n in names])
    found_gradients = torch.autograd.grad(found, [taken.module.get_parameter(n) for n in names])
    torch.testing.assert_close(found_gradients, wanted_gradients, atol=1e-4, rtol=1e-4)


def test_a_cut_graph_never_makes_its_logits() -> None:
    graph = tiny_graph()
    assert cut_head(graph)
    graph.verify()
    assert not [site for site in graph.sites("aten.linear") if site.role == "head"]


def test_a_teacher_with_another_vocabulary_is_refused() -> None:
    loss = Distillation(Kd(), lambda batch: Features(torch.zeros(24, 100)))
    with pytest.raises(QcError) as caught:
        loss(Features(torch.zeros(24, 264)), batch())
    assert str(caught.value) == (
        "the teacher has 100 tokens and the student 264\n  fix    distil from a teacher with the same tokenizer"
    )
