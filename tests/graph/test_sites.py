"""Sites: names, roles and blocks of many architectures, and what a site says of its op."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from torch import nn

from graph import Graph, QcError, capture, capture_module
from graph.select import ROLES
from graph.sites import Malformed
from tests.architectures import CAUSAL, ENCODERS, REFUSED, config
from tests.graph.tiny import qwen

LINEARS = {
    "qwen3": ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down"),
    "gpt_neox": ("attn.qkv", "attn.o", "mlp.up", "mlp.down"),
    "phi3": ("attn.qkv", "attn.o", "mlp.gate_up", "mlp.down"),
    "gpt2": ("attn.qkv", "attn.o", "mlp.up", "mlp.down"),
    "bert": ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down"),
    "bloom": ("attn.qkv", "attn.o", "mlp.up", "mlp.down"),
    "gptj": ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down"),
    "apertus": ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down"),
}
"""Of the last three the activation is written out, as ops that read what goes into it several times."""

QUICK = ("gpt_neox", "phi3", "bert", "bloom", "gptj")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in LINEARS])
def test_the_linears_of_a_block_have_the_roles_that_the_flow_gives_them(name: str) -> None:
    graph = capture(config(name))
    roles = [(site.block, site.role) for site in graph.sites("aten.linear") if site.block is not None]
    assert graph.blocks == 2
    assert roles == [(block, role) for block in (0, 1) for role in LINEARS[name]]
    heads = [site.role for site in graph.sites("aten.linear") if site.block is None]
    assert heads == (["head"] if name in CAUSAL else [])
    outputs = [site for site in graph.sites() if site.role == "block_out"]
    assert [site.block for site in outputs] == [0, 1]
    assert {tuple(site.value.shape) for site in outputs} == {(3, 17, 32)}
    norms = [
        name for name, info in graph.tensors().items() if re.search(r"(norm|ln_)[^.]*\.(weight|bias)$", name, re.I)
    ]
    assert norms
    assert {graph.info(name).role for name in norms} == {"norm"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in (*CAUSAL, *ENCODERS) if n not in REFUSED])
def test_every_architecture_has_unique_names_known_roles_and_a_role_for_every_linear(name: str) -> None:
    graph = capture(config(name))
    names = Counter(site.name for site in graph.sites())
    assert [site for site, times in names.items() if times > 1] == []
    known = {role for role in ROLES if "*" not in role}
    assert {site.role for site in graph.sites()} <= known
    assert [site.name for site in graph.sites("aten.linear") if site.role == "other" and site.block is not None] == []
    assert {site.role for site in graph.sites("aten.embedding")} <= {"embed", "other"}
    assert sum(site.role == "block_out" for site in graph.sites()) == graph.blocks


def test_a_module_gives_its_only_op_its_name_and_others_a_name_of_their_own() -> None:
    names = [site.name for site in qwen(1).sites()]
    assert "model.layers.0.mlp.up_proj" in names
    assert [name for name in names if name.startswith("model.layers.0/")] == [
        "model.layers.0/add",
        "model.layers.0/add.2",
    ]
    assert [name for name in names if "rope" in name] == [
        "model.layers.0.self_attn/rope",
        "model.layers.0.self_attn/rope.2",
    ]


def test_a_site_tells_its_op_type_tensors_and_weight() -> None:
    graph = qwen()
    up = graph.site("model.layers.1.mlp.up_proj")
    assert (up.op, up.role, up.block, up.stack, up.trainable) == ("aten.linear", "mlp.up", 1, None, False)
    assert (tuple(up.value.shape), up.value.dtype) == ((3, 17, 64), torch.float32)
    assert up.weight() == "model.layers.1.mlp.up_proj.weight"
    assert up.tensors() == [up.weight()]
    assert str(up) == up.name
    assert graph.site("lm_head").weight() == graph.site("model.embed_tokens").weight() == "model.embed_tokens.weight"
    assert graph.site("model/attention_mask").weight() is None
    graph.set_info(str(up.weight()), trainable=True)
    assert up.trainable
    graph.set_info(str(up.weight()), trainable=False)


def test_a_computed_weight_is_none_and_its_tensors_are_found_through_it() -> None:
    graph = capture_module(nn.Linear(4, 4), torch.ones(1, 4))
    linear = graph.sites("aten.linear")[0]
    linear.set_input(1, graph.insert("aten.mul.Tensor", linear.input(1), 2.0, name="twice", before=linear.node))
    assert linear.weight() is None
    assert linear.tensors() == ["bias", "weight"]
    assert linear.input(0).target == "input"
    with pytest.raises(AssertionError, match=r"argument 1 of twice is the constant 2\.0"):
        graph.site("twice").input(1)


def test_an_input_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(QcError) as caught:
        qwen(1)(input_ids=torch.ones(1, 2, dtype=torch.long), past=None)
    assert str(caught.value) == "the graph has no input 'past'\n  fix    its inputs are input_ids, attention_mask"


# -- what a graph may not be ----------------------------------------------------------------------------------------


def linear() -> Graph:
    return capture_module(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.ones(1, 4))


def malformed(graph: Graph) -> tuple[str, str]:
    with pytest.raises(Malformed) as caught:
        graph.verify()
    return caught.value.site, str(caught.value)


def test_a_malformed_graph_names_its_site() -> None:
    twice = linear()
    twice.insert("aten.relu", twice.site("0").node, name="1", before=twice.site("2").node)
    twice.site("2").set_input(
        0, twice.module.graph.find_nodes(op="call_function", target=twice.site("1").node.target)[-1]
    )
    twice.set_outputs([twice.site("2").node, twice.site("1").node])
    assert malformed(twice) == ("1", "2 ops are called 1")

    untyped = linear()
    del untyped.site("1").node.meta["vals"]
    assert malformed(untyped) == ("1", "1 has no type")

    backwards = linear()
    backwards.site("0").set_input(0, backwards.site("1").node)
    assert malformed(backwards) == ("0", "0 reads 1, which comes later")

    unknown = linear()
    unknown.site("0").input(1).target = "nowhere"
    assert malformed(unknown) == ("nowhere", "nowhere is read and is no tensor of the graph")

    gone = linear()
    delattr(gone.module.get_submodule("0"), "weight")
    assert malformed(gone) == ("0.weight", "0.weight is gone, and the graph still lists it")

    frozen = linear()
    frozen.module.get_parameter("2.weight").requires_grad_(False)
    assert malformed(frozen) == ("2.weight", "2.weight says trainable=True and requires_grad=False")
