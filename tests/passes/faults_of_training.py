"""Bugs of passes that say what trains: LoRA, its merging, and set-trainable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graph import Graph, Selector
from passes.add_lora import AddLora
from passes.merge_lora import MergeLora
from passes.set_trainable import SetTrainable
from tests.passes.sabotage import DOWN, GATE, NORM, UP, K, O, Q, V, fault, missed, put, replaced, reroute

LORA, MERGE = AddLora(rank=2, alpha=16, select=Selector(name=(Q, K, V, O, UP, GATE))), MergeLora()
TRAIN = SetTrainable(groups={"norms": Selector(role="norm")})
UPDATE = f"{UP}/lora.default"


@fault(LORA, site=UPDATE)
def b_not_zero_at_first(graph: Graph) -> None:
    put(graph, f"{UP}.lora_B.default.weight", lambda b: b + 0.01)


@fault(LORA, site=f"{K}/lora.default")
def update_reads_another_input(graph: Graph) -> None:
    graph.site(f"{K}/lora.default").set_input(1, graph.site(f"{Q}/lora.default").input(0))


@fault(LORA, site=UPDATE)
def update_not_read_by_anyone(graph: Graph) -> None:
    update = graph.site(UPDATE)
    update.node.replace_all_uses_with(update.input(0))


@fault(AddLora(rank=2, dropout=0.1, select=Selector(name=UP)), site=f"{UP}/lora.default.dropout")
def dropout_in_evaluation_too(graph: Graph) -> None:
    graph.site(f"{UP}/lora.default.dropout").node.update_arg(2, True)


@fault(LORA, site=UPDATE)
def update_in_the_place_of_the_linear(graph: Graph) -> None:
    update = graph.site(UPDATE)
    update.set_input(0, graph.insert("aten.zeros_like", update.input(0), name="new", before=update.node))


@fault(AddLora(rank=2, select=Selector(role="attn.k")), site=K)
def update_beside_another_linear_than_reported(graph: Graph) -> tuple[str, ...]:
    return (Q,)


@fault(LORA, site=f"{GATE}/lora.default.new")
def gradient_cut_at_an_update(graph: Graph) -> None:
    reroute(graph, f"{GATE}/lora.default", "aten.detach", name=f"{GATE}/lora.default.new")


@fault(LORA, site=NORM)
def norm_trains_along(graph: Graph) -> None:
    graph.set_info(f"{NORM}.weight", trainable=True)


@fault(LORA, site=f"{UP}.lora_A.default.weight")
def update_marked_as_trained_and_frozen(graph: Graph) -> None:
    graph.module.get_parameter(f"{UP}.lora_A.default.weight").requires_grad_(False)


@fault(LORA, site=DOWN)
def a_of_the_wrong_dtype(graph: Graph) -> None:
    put(graph, f"{DOWN}.weight", Tensor.double)


@missed(LORA, why="B is zero until it is trained, so alpha shows in nothing that can be computed before")
def alpha_of_the_wrong_size(graph: Graph) -> None:
    graph.site(UPDATE).node.update_arg(4, 1.0)


# -- merge-lora -----------------------------------------------------------------------------------------------------


def without_alpha(weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor | None, scale: float) -> Tensor:
    return weight + b @ a


replaced("alpha forgotten in the merge", MERGE, Q, "graph.lora_sets.merged", without_alpha, first=(LORA,))


@fault(MERGE, site=O, first=(LORA,))
def update_lost_in_the_merge(graph: Graph) -> None:
    put(graph, f"{O}.weight", lambda w: w * 0.5)


@fault(MERGE, site=K, first=(LORA,))
def merged_into_another_site(graph: Graph) -> None:
    first, second = graph.tensor(f"{K}.weight"), graph.tensor(f"{V}.weight")
    graph.set_tensor(f"{K}.weight", second)
    graph.set_tensor(f"{V}.weight", first)


# -- set-trainable --------------------------------------------------------------------------------------------------


@fault(TRAIN, site=UP)
def another_tensor_trains(graph: Graph) -> None:
    graph.set_info(f"{UP}.weight", trainable=True)


@fault(TRAIN, site=f"{NORM}.weight")
def frozen_parameter_that_wants_gradients(graph: Graph) -> None:
    graph.module.get_parameter(f"{NORM}.weight").requires_grad_(False)


@fault(TRAIN, site=NORM)
def value_changed_with_the_flag(graph: Graph) -> None:
    put(graph, f"{NORM}.weight", torch.ones_like)


def deaf(self: Graph, name: str, **changes: Any) -> None:
    if not (name == "model.norm.weight" and changes.get("trainable") is False):
        set_info(self, name, **changes)


set_info = Graph.set_info
replaced(
    "frozen parameter left trainable", SetTrainable(), "model.norm", "graph.core.Graph.set_info", deaf, first=(TRAIN,)
)


@missed(TRAIN, why="what a group is for only the recipe knows; the report names the tensors of each")
def groups_exchanged(graph: Graph) -> None:
    graph.set_info(f"{NORM}.weight", group="biases")
