"""Gated cross-attention: the mathematics, what it leaves alone, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graph import Graph, QcError
from graph.artifact import load, save
from graph.gca import GcaGate, blocks_of
from graph.memory import add_gated, memory_attention, memory_weights
from graph.text import diff
from passes.insert_gca import InsertGca
from passes.runner import apply
from tests.graph.tiny import qwen
from tests.passes.memories import EVERYWHERE, decoder, memory, tokens

GCA = "model.layers.1.gca"


def run(graph: Graph, **inputs: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = graph(**inputs)
    return found


def test_it_reads_the_memory_behind_a_block_and_adds_what_it_found() -> None:
    graph = qwen()
    before = str(graph)
    apply(InsertGca(layers=(1,)), graph)
    lines = [line for line in diff(before, str(graph)).splitlines()[2:] if line[0] in "+-"]
    found = "\n".join(lines).replace("model.layers.1", "*")
    assert found == PICTURE


PICTURE = """
+memory: f32[B, M, 32] = None
+memory_mask: i64[B, M] = None
+memory/batch = sym_size.int(input_ids, 0) : int B
+memory/tokens = qc.memory_tokens(memory, memory/batch, 32, model) : f32[B, M, 32]
+memory/seen = qc.memory_seen(memory_mask, memory/tokens) : bool[B, M]
-model.norm = qc.rms_norm(*/add.2, model.norm.weight: f32[32], 1e-06) : f32[B, T, 32]
+*.gca.norm = qc.rms_norm(*/add.2, *.gca.norm.weight: f32[32], 1e-06, False, True) : f32[B, T, 32]
+*.gca.q_proj/cast = to.dtype(*.gca.q_proj.weight: f32[32, 32], model) : f32[32, 32]
+*.gca.q_proj = linear(*.gca.norm, *.gca.q_proj/cast) : f32[B, T, 32]
+*.gca.q_proj/heads = unflatten.int(*.gca.q_proj, -1, [2, 16]) : f32[B, T, 2, 16]
+*.gca.q_proj/transposed = transpose.int(*.gca.q_proj/heads, 1, 2) : f32[B, 2, T, 16]
+*.gca.k_proj/cast = to.dtype(*.gca.k_proj.weight: f32[16, 32], model) : f32[16, 32]
+*.gca.k_proj = linear(memory/tokens, *.gca.k_proj/cast) : f32[B, M, 16]
+*.gca.k_proj/heads = unflatten.int(*.gca.k_proj, -1, [1, 16]) : f32[B, M, 1, 16]
+*.gca.k_proj/transposed = transpose.int(*.gca.k_proj/heads, 1, 2) : f32[B, 1, M, 16]
+*.gca.v_proj/cast = to.dtype(*.gca.v_proj.weight: f32[16, 32], model) : f32[16, 32]
+*.gca.v_proj = linear(memory/tokens, *.gca.v_proj/cast) : f32[B, M, 16]
+*.gca.v_proj/heads = unflatten.int(*.gca.v_proj, -1, [1, 16]) : f32[B, M, 1, 16]
+*.gca.v_proj/transposed = transpose.int(*.gca.v_proj/heads, 1, 2) : f32[B, 1, M, 16]
+*.gca.attention = qc.memory_attention(*.gca.q_proj/transposed, *.gca.k_proj/transposed, *.gca.v_proj/transposed, memory/seen) : f32[B, T, 2, 16]
+*.gca.attention.flat = flatten.using_ints(*.gca.attention, 2, 3) : f32[B, T, 32]
+*.gca.o_proj/cast = to.dtype(*.gca.o_proj.weight: f32[32, 32], model) : f32[32, 32]
+*.gca.o_proj = linear(*.gca.attention.flat, *.gca.o_proj/cast) : f32[B, T, 32]
+*.gca.add = qc.add_gated(*/add.2, *.gca.o_proj, *.gca.gate: f32[1], memory/seen, sigmoid) : f32[B, T, 32]
+model.norm = qc.rms_norm(*.gca.add, model.norm.weight: f32[32], 1e-06) : f32[B, T, 32]
""".strip()


# -- A1 to A3: what it leaves as it was ----------------------------------------------------------------------------


def test_without_a_memory_the_logits_are_those_of_the_model_to_the_bit() -> None:
    ids = tokens()
    whole = run(qwen(), input_ids=ids)
    assert torch.equal(run(decoder(), input_ids=ids), whole)
    assert torch.equal(run(decoder(), input_ids=ids, memory=memory()[:, :0]), whole)


def test_a_gate_at_zero_lets_nothing_through() -> None:
    graph = qwen()
    apply(InsertGca(layers=(0, 1), gate=GcaGate(function="tanh", init=0.0)), graph)
    assert torch.equal(run(graph, input_ids=tokens(), memory=memory()), run(qwen(), input_ids=tokens()))


def test_rows_without_a_memory_are_those_of_the_model_in_any_batch() -> None:
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[1] = 0
    found, whole = (
        run(decoder(), input_ids=tokens(), memory=memory(), memory_mask=mask),
        run(qwen(), input_ids=tokens()),
    )
    assert torch.equal(found[1], whole[1])
    assert (found - whole).abs().amax((1, 2))[[0, 2]].min() > 0.01


# -- A4 to A7: a memory is a set, and its attention is attention ---------------------------------------------------


def test_the_order_of_a_memory_does_not_matter() -> None:
    order, mask = torch.tensor([3, 0, 4, 1, 2]), torch.ones(3, 5, dtype=torch.long)
    mask[2, 3:] = 0
    one = run(decoder(), input_ids=tokens(), memory=memory(), memory_mask=mask)
    other = run(decoder(), input_ids=tokens(), memory=memory()[:, order], memory_mask=mask[:, order])
    assert (one - other).abs().max() <= 1e-5


def test_what_lies_in_masked_slots_does_not_matter() -> None:
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[:, 3:] = 0
    garbage = memory()
    garbage[:, 3:] = 1e3
    one = run(decoder(), input_ids=tokens(), memory=memory(), memory_mask=mask)
    assert (one - run(decoder(), input_ids=tokens(), memory=garbage, memory_mask=mask)).abs().max() <= 1e-6
    assert (one - run(decoder(), input_ids=tokens(), memory=memory()[:, :3])).abs().max() <= 1e-6


def qkv(heads: int = 4, kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, n, size, 8, generator=generator) for n, size in ((heads, 3), (kv_heads, 5), (kv_heads, 5))
    )
    seen = torch.ones(2, 5, dtype=torch.bool)
    seen[1, 2:] = False
    return q, k, v, seen


def test_the_fused_attention_is_that_of_weights_that_sum_to_one() -> None:
    q, k, v, seen = qkv()
    weights = memory_weights(q, k, seen)
    spelled_out = torch.matmul(weights, v.repeat_interleave(2, dim=1)).transpose(1, 2)
    assert (memory_attention(q, k, v, seen) - spelled_out).abs().max() <= 1e-5
    assert torch.allclose(weights.sum(-1), torch.ones(2, 4, 3))
    assert not bool(weights[1, :, :, 2:].any())


def test_query_heads_share_keys_as_a_loop_over_heads_would() -> None:
    q, k, v, seen = qkv()
    found = memory_attention(q, k, v, seen)
    for row in range(2):
        for head in range(4):
            scores = q[row, head] @ k[row, head // 2].T / math.sqrt(8)
            scores[:, ~seen[row]] = -math.inf
            assert torch.allclose(found[row, :, head], scores.softmax(-1) @ v[row, head // 2], atol=1e-6)


@pytest.mark.parametrize("function", ["sigmoid", "tanh"])
def test_a_gate_scales_what_is_added_to_the_unnormed_stream(function: str) -> None:
    x, update, gate = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.tensor([0.3])
    found = add_gated(x, update, gate, torch.tensor([[True], [False]]), function)
    opened = math.tanh(0.3) if function == "tanh" else 1 / (1 + math.exp(-0.3))
    assert torch.allclose(found[0], x[0] + opened * update[0])
    assert torch.equal(found[1], x[1])


# -- A8: where it goes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "options", "blocks"),
    [
        (28, {}, [9, 12, 15, 18, 21, 24, 27]),
        (12, {}, [4, 7, 10]),
        (36, {}, list(range(12, 36, 3))),
        (32, {"start": 6}, list(range(6, 31, 3))),
        (28, {"every_n": 1, "start": 18}, list(range(18, 28))),
        (28, {"layers": (7, 3, 7)}, [3, 7]),
    ],
)
def test_blocks_are_a_third_up_and_every_third_unless_told_otherwise(
    count: int, options: dict[str, Any], blocks: list[int]
) -> None:
    assert InsertGca(**options).blocks(count) == blocks


def test_every_chosen_block_has_one_and_so_has_what_is_saved_and_copied(tmp_path: Path) -> None:
    graph = qwen(4)
    report = apply(InsertGca(every_n=2, start=0), graph)
    assert report.figures["layers"] == "0, 2"
    again = save(tmp_path / "artifact", graph).graph
    for one in (graph, graph.copy(), again, load(tmp_path / "artifact").graph):
        assert [site.block for site in blocks_of(one)] == [0, 2]
        assert str(one) == str(graph)
    given = {"input_ids": tokens(), "memory": memory()}
    assert torch.equal(run(again.materialize(), **given), run(graph, **given))


def test_it_can_stand_between_attention_and_mlp() -> None:
    graph = qwen()
    apply(InsertGca(layers=(0,), point="after_attn"), graph)
    assert graph.site("model.layers.0.gca.add").input(0).meta["custom"]["site"] == "model.layers.0/add"
    assert graph.site("model.layers.0.post_attention_layernorm").input(0) is graph.site("model.layers.0.gca.add").node


def test_heads_may_have_any_size_and_a_memory_another_width() -> None:
    graph = qwen()
    apply(InsertGca(layers=(1,), heads=4, kv_heads=2, head_dim=6, width=20, separate_values=True), graph)
    shapes = {letter: graph.shape(f"{GCA}.{letter}_proj.weight") for letter in "qkvo"}
    assert shapes == {"q": (24, 32), "k": (12, 20), "v": (12, 20), "o": (32, 24)}
    small, given = memory()[:, :, :20], {"input_ids": tokens()}
    assert torch.equal(run(graph, memory=small, **given), run(graph, memory=small, memory_value=small, **given))
    assert (
        run(graph, memory=small, memory_value=-small, **given) - run(graph, memory=small, **given)
    ).abs().max() > 0.01


# -- A9: what is kept in which dtype, and what trains --------------------------------------------------------------


def test_gates_and_norms_stay_in_fp32_and_projections_have_fp32_masters(tmp_path: Path) -> None:
    graph = decoder()
    graph.materialize()
    moved = save(tmp_path / "artifact", graph).graph.materialize().to(torch.bfloat16)
    for one in (moved, save(tmp_path / "again", moved).graph):
        dtypes = {name: one.dtype_of(name) for name in one.tensors()}
        assert {dtype for name, dtype in dtypes.items() if ".gca." in name} == {torch.float32}
        assert dtypes["model.layers.0.mlp.up_proj.weight"] == torch.bfloat16
    found = run(moved, input_ids=tokens(), memory=memory())
    assert found.dtype == torch.bfloat16
    assert (found - run(graph, input_ids=tokens(), memory=memory())).abs().max() < 0.1


def test_it_alone_trains_as_one_group() -> None:
    trained = {name: info for name, info in decoder().tensors().items() if info.trainable}
    assert {info.group for info in trained.values()} == {"gca"}
    assert all(".gca." in name for name in trained)
    assert len(trained) == 2 * 6
    assert trained[f"{GCA}.gate"].pinned
    assert trained[f"{GCA}.norm.weight"].role == "gca.norm"


def test_projections_depend_on_the_seed_and_their_place_alone() -> None:
    one, other, third = qwen(), qwen(), qwen()
    for graph, step in ((one, EVERYWHERE), (other, InsertGca(layers=(1,))), (third, InsertGca(layers=(1,), seed=1))):
        apply(step, graph)
    name = f"{GCA}.q_proj.weight"
    assert torch.equal(one.tensor(name), other.tensor(name))
    assert not torch.equal(one.tensor(name), third.tensor(name))
    assert one.tensor(name).abs().max() <= 1 / math.sqrt(32)


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers": (5,)}, "there is no block 5 to put it behind\n  fix    the blocks are 0 to 1"),
        ({"start": 2}, "start 2 leaves none of 2 blocks\n  fix    lower start"),
        (
            {"heads": 3, "layers": (0,)},
            "a width of 32 does not divide into 3 heads\n  fix    give head_dim",
        ),
        (
            {"heads": 4, "kv_heads": 3, "layers": (0,)},
            "4 heads cannot share 3 key/value heads\n  fix    give heads and kv_heads",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(QcError) as caught:
        apply(InsertGca(**options), qwen())
    assert str(caught.value) == said


def test_a_second_one_is_refused() -> None:
    with pytest.raises(QcError) as caught:
        apply(EVERYWHERE, decoder())
    assert str(caught.value) == ("the graph reads a memory already\n  fix    take one of the two insert-gca out")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers": (1,), "start": 1}, "layers stands beside every_n or start\n  fix    keep layers, or the other two"),
        ({"every_n": 0}, "every_n is 0\n  fix    give a number from 1"),
        (
            {"output_dropout": 1.0},
            "output_dropout is 1\n  fix    give a share from 0 to below 1; 0.1 is usual",
        ),
        (
            {"gate": GcaGate(init=math.nan)},
            "gate.init is nan\n  fix    give a number; -1 is usual with sigmoid",
        ),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(QcError) as caught:
        InsertGca(**options)
    assert str(caught.value) == said
