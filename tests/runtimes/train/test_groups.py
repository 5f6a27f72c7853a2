from __future__ import annotations

import pytest

from graph import Graph, QcError, Selector
from runtimes.settings import Group, TextFiles, Train
from runtimes.train.groups import members, optimizer
from tests.runtimes.train.tiny import tiny_graph

DOWN = {"name": "*down_proj*"}


def train(**groups: Group) -> Train:
    return Train(data=TextFiles(text="*"), steps=1, groups=groups)


def chosen(graph: Graph, **groups: Group) -> dict[str, int]:
    return {m.name: len(m.tensors) for m in members(graph, train(**groups))}


def refused(graph: Graph, **groups: Group) -> str:
    with pytest.raises(QcError) as caught:
        members(graph, train(**groups))
    return str(caught.value)


@pytest.fixture(scope="module")
def graph() -> Graph:
    """Six MLP weights are trainable, those that go down as group ``lora.down``."""
    graph = tiny_graph("mlp")
    for name in graph.tensors():
        if "down_proj" in name:
            graph.set_info(name, group="lora.down")
    return graph


def test_a_group_takes_what_its_selector_selects_and_one_without_takes_the_rest(graph: Graph) -> None:
    assert chosen(graph, a=Group(lr=1.0, select=Selector(role="mlp.down")), b=Group(lr=2.0)) == {"a": 2, "b": 4}
    assert chosen(graph, a=Group(lr=1.0, select=DOWN), b=Group(lr=2.0, select={"exclude": ["mlp.down"]})) == {
        "a": 2,
        "b": 4,
    }


def test_a_group_can_be_selected_by_the_group_that_a_pass_gave(graph: Graph) -> None:
    assert chosen(graph, a=Group(lr=1.0, select={"group": "lora.*"}), b=Group(lr=2.0)) == {"a": 2, "b": 4}


def test_a_group_named_like_one_that_a_pass_gave_takes_it(graph: Graph) -> None:
    assert chosen(graph, lora=Group(lr=1.0), others=Group(lr=2.0)) == {"lora": 2, "others": 4}


def test_lr_alone_is_one_group(graph: Graph) -> None:
    (only,) = members(graph, Train(data=TextFiles(text="*"), steps=1, lr=0.5))
    assert (only.name, only.group.lr, len(only.tensors)) == ("all", 0.5, 6)


def test_nothing_trainable_is_an_error() -> None:
    assert refused(tiny_graph("no such tensor"), a=Group(lr=1.0)) == (
        "nothing is trainable\n  fix    add a pass that makes something trainable: add-lora or set-trainable"
    )


def test_a_selector_without_a_match_is_an_error(graph: Graph) -> None:
    assert refused(graph, a=Group(lr=1.0, select=Selector(role="attn.q")), b=Group(lr=1.0)) == (
        "group 'a': select {role: attn.q} matches no trainable tensor\n"
        "  fix    the roles here are mlp.down, mlp.gate, mlp.up"
    )
    assert refused(graph, a=Group(lr=1.0, select={"group": "gca"}), b=Group(lr=1.0)) == (
        "group 'a': select {group: gca} matches no trainable tensor\n  fix    the groups are lora.down"
    )


def test_two_groups_cannot_train_the_same_tensor(graph: Graph) -> None:
    assert refused(graph, a=Group(lr=1.0, select=DOWN), b=Group(lr=1.0, select={"role": "mlp.*"})) == (
        "groups 'a' and 'b' both select model.layers.0.mlp.down_proj.weight\n"
        "  fix    make the selectors exclusive; exclude: takes names out"
    )
    assert refused(graph, a=Group(lr=1.0), b=Group(lr=1.0)) == (
        "groups 'a' and 'b' both take everything that is left\n  fix    give all groups but one a select"
    )


def test_every_trainable_tensor_needs_a_group_and_every_group_tensors(graph: Graph) -> None:
    assert refused(graph, a=Group(lr=1.0, select=DOWN)) == (
        "no group trains model.layers.0.mlp.gate_proj.weight and 3 more\n"
        "  fix    add a group without select, or freeze the tensors with set-trainable"
    )
    assert refused(graph, a=Group(lr=1.0, select={"role": "mlp.*"}), b=Group(lr=1.0)) == (
        "nothing is left for group 'b'\n  fix    take the group out; the others select all that is trainable"
    )


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_norms_and_vectors_do_not_decay(kind: str) -> None:
    graph = tiny_graph("layers.0")
    parameters = {name: graph.tensor(name) for name, info in graph.tensors().items() if info.trainable}
    groups = members(graph, train(a=Group(lr=1.0, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6)))
    made = optimizer(groups, parameters, graph, kind)
    decay = {name: entry["weight_decay"] for entry in made.param_groups for name in entry["names"]}
    assert {name for name, value in decay.items() if value} == {n for n in parameters if "proj" in n}
    assert {name for name, value in decay.items() if not value} == {n for n in parameters if "norm" in n}
    options = made.param_groups[0]
    assert options["momentum"] == 0.8 if kind == "sgd" else (options["betas"], options["eps"]) == ((0.8, 0.9), 1e-6)
    assert options["fused"]
