"""Types: sizes in symbols, of any op, without a value being computed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from graph import Graph, capture_module
from graph.shapes import SYMBOLS, dims_of, symbolic
from graph.sites import Malformed
from graph.text import type_of
from tests.graph.tiny import qwen

FIRST, LAST = ({name: sizes[i] for name, sizes in SYMBOLS.items()} for i in (0, 2))
WORLDS = [FIRST, *({**FIRST, name: sizes[1]} for name, sizes in SYMBOLS.items()), LAST]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (lambda w: 64, "64"),
        (lambda w: w["T"], "T"),
        (lambda w: 2 * w["T"], "2*T"),
        (lambda w: w["B"] * w["T"], "B*T"),
        (lambda w: 4 * w["B"] * w["T"], "4*B*T"),
        (lambda w: w["T"] + 1, "T + 1"),
        (lambda w: w["T"] - 1, "T - 1"),
        (lambda w: 2 * w["T"] - 3, "2*T - 3"),
        (lambda w: w["N"] + w["T"], "T + N"),
        (lambda w: w["S"] - w["N"] + 2, "S - N + 2"),
        (lambda w: 3 - w["T"], "-T + 3"),
        (lambda w: w["T"] ** 2, "f(T)"),
        (lambda w: w["T"] // 2, "f(T)"),
        (lambda w: w["B"] * (w["T"] + 1), "f(B, T)"),
        (lambda w: max(w["T"], w["N"] + 7), "f(T, N)"),
        (lambda w: 0, "0"),
        (lambda w: -1, "-1"),
    ],
)
def test_a_size_is_written_in_the_symbols_it_moves_with(size: Callable[[dict[str, int]], int], text: str) -> None:
    assert symbolic([size(world) for world in WORLDS]) == text


def test_no_two_symbols_could_be_taken_for_one_another() -> None:
    sizes = [size for pair in SYMBOLS.values() for size in pair]
    assert len(set(sizes)) == len(sizes)
    assert all(sum(other % size == 0 for other in sizes) == 1 for size in sizes)


def test_batch_and_length_are_symbols_in_a_captured_model() -> None:
    graph = qwen()
    assert dims_of(graph.site("lm_head").node) == ("B", "T", "50")
    assert dims_of(graph.site("model.layers.0.self_attn/attention").node) == ("B", "T", "2", "16")
    assert dims_of(graph.site("model/attention_mask").node) == ("B", "1", "T", "T")


def test_an_inserted_op_is_typed_at_once_in_every_world() -> None:
    graph = qwen()
    last = graph.module.graph.output_node()
    head = graph.site("lm_head").node
    memory = graph.add_input("memory", torch.empty(0), dims=("B", "S", 50))
    joined = graph.insert("aten.cat", [head, memory], 1, name="cat", before=last)
    assert type_of(joined) == "f32[B, T + S, 50]"
    assert (
        type_of(graph.insert("aten.flatten.using_ints", joined, 0, 1, name="flat", before=last))
        == "f32[f(B, T, S), 50]"
    )
    assert type_of(graph.insert("aten.to.dtype", head, torch.bfloat16, name="to", before=last)) == "bf16[B, T, 50]"
    assert type_of(graph.insert("aten.sym_size.int", joined, 1, name="size", before=last)) == "int T + S"
    assert (
        type_of(graph.insert("aten.split.Tensor", head, 30, -1, name="split", before=last))
        == "(f32[B, T, 30], f32[B, T, 20])"
    )


def test_an_op_that_cannot_take_its_arguments_is_named() -> None:
    graph = capture_module(nn.Linear(4, 3), torch.ones(2, 4))
    linear = graph.sites()[0]
    with pytest.raises(Malformed, match="reduction dim") as caught:
        graph.insert("aten.matmul", linear.node, linear.node, name="square", before=graph.module.graph.output_node())
    assert caught.value.site == "square"


def test_fixed_shapes_stay_numbers() -> None:
    graph = capture_module(nn.Linear(4, 3), torch.ones(3, 17, 4))
    assert str(graph).splitlines()[-2:] == [
        "linear = linear(input, weight: f32[3, 4], bias: f32[3]) : f32[3, 17, 3]",
        "return linear",
    ]


def test_types_follow_the_dtype_of_the_graph() -> None:
    graph: Graph = qwen().to(torch.bfloat16)
    assert type_of(graph.site("lm_head").node) == "bf16[B, T, 50]"
    assert type_of(graph.site("model.rotary_emb/cos").node) == "f32[1, T, 16]"
    assert type_of(graph.site("model.rotary_emb/to.2").node) == "bf16[1, T, 16]"
