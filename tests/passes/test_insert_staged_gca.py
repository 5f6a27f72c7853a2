"""Staged gated cross-attention: documents first, then their tokens (A.12)."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graph import Graph, QcError
from graph.artifact import load, save
from graph.encoder import as_encoder
from graph.gca import GcaGate
from graph.memory import memory_weights
from graph.prepared import part, prepare
from graph.staged import document_weights, last_tokens, token_weights
from graph.text import diff
from passes.attach_memory import AttachMemory
from passes.hoist_memory_kv import HoistMemoryKv
from passes.insert_staged_gca import InsertStagedGca
from passes.runner import apply, link
from tests.graph.tiny import qwen
from tests.passes.memories import chunks, memory, tokens

STAGED = InsertStagedGca(pairs=2, start=0, gap=1)
DOCUMENTS = torch.tensor([[1, 1, 2, 2, 2], [1, 2, 3, 3, 0], [0, 0, 0, 0, 0]])


@cache
def _decoder(per_position: bool) -> Graph:
    graph = qwen(3)
    gate = GcaGate(init=1.0)
    apply(InsertStagedGca(pairs=2, start=0, gap=1, per_position=per_position, gate=gate), graph)
    return graph


def decoder(per_position: bool = True) -> Graph:
    return _decoder(per_position).copy()


def run(graph: Graph, **inputs: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = graph(**inputs)
    return found


# -- the ops --------------------------------------------------------------------------------------------------------


def test_the_last_token_of_a_document_is_the_one_before_another_or_padding() -> None:
    found = last_tokens(DOCUMENTS)
    assert found.int().tolist() == [[0, 1, 0, 0, 1], [1, 1, 0, 1, 0], [0, 0, 0, 0, 0]]
    assert last_tokens(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0)


def test_the_weights_of_documents_are_one_softmax_over_their_last_tokens() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(3, 4, 6, 8), torch.randn(3, 2, 5, 8)
    found = document_weights(q, k, last_tokens(DOCUMENTS))
    first = torch.stack([q[0, head] @ k[0, head // 2, [1, 4]].T / 8**0.5 for head in range(4)]).softmax(-1).mean(0)
    assert (found[0][:, [1, 4]] - first).abs().max() < 1e-6
    assert found[0][:, [0, 2, 3]].abs().max() == 0
    assert found[2].abs().max() == 0  # nothing is looked at where there is nothing
    whole = document_weights(q, k, last_tokens(DOCUMENTS), per_position=False)
    assert (whole - found.mean(1, keepdim=True)).abs().max() < 1e-7


def test_every_token_has_the_weight_of_its_document() -> None:
    weights = torch.tensor([[[0.0, 0.7, 0.0, 0.0, 0.3]], [[0.5, 0.2, 0.0, 0.3, 0.0]], [[0.0] * 5]])
    found = token_weights(weights, last_tokens(DOCUMENTS))
    assert found[:2, 0].tolist() == [pytest.approx([0.7, 0.7, 0.3, 0.3, 0.3]), pytest.approx([0.5, 0.2, 0.3, 0.3, 0.0])]


def test_a_document_without_weight_is_hardly_read() -> None:
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
    prior = torch.tensor([[[1.0, 1.0, 0.0, 0.0, 0.0]]])
    found = memory_weights(q, k, torch.ones(1, 5, dtype=torch.bool), prior)
    assert found[..., 2:].sum(-1).max() < 1e-3
    assert (found.sum(-1) - 1).abs().max() < 1e-6


# -- the pass -------------------------------------------------------------------------------------------------------


def test_a_fine_block_reads_what_the_coarse_one_before_it_weighed() -> None:
    graph = qwen(3)
    before = str(graph)
    apply(STAGED, graph)
    lines = [line[1:] for line in diff(before, str(graph)).splitlines()[2:] if line[0] == "+"]
    wanted = ("memory/", ".weights", ".spread", ".attention =", ".add =")
    found = "\n".join(line for line in lines if any(part in line.split(" = ")[0] + " =" for part in wanted))
    assert found.replace("model.layers.", "*") == PICTURE


PICTURE = """
memory/batch = sym_size.int(input_ids, 0) : int B
memory/tokens = qc.memory_tokens(memory, memory/batch, 32, model) : f32[B, M, 32]
memory/seen = qc.memory_seen(memory_mask, memory/tokens) : bool[B, M]
memory/documents = qc.memory_documents(memory_mask, memory/tokens) : i64[B, M]
memory/last = qc.last_tokens(memory/documents) : bool[B, M]
*0.gca.coarse.attention = qc.memory_attention(*0.gca.coarse.q_proj/transposed, *0.gca.coarse.k_proj/transposed, *0.gca.coarse.v_proj/transposed, memory/last) : f32[B, T, 2, 16]
*0.gca.coarse.add = qc.add_gated(*0/add.2, *0.gca.coarse.o_proj, *0.gca.coarse.gate: f32[1], memory/last, sigmoid) : f32[B, T, 32]
*0.gca.coarse.weights = qc.document_weights(*0.gca.coarse.q_proj/transposed, *0.gca.coarse.k_proj/transposed, memory/last, True) : f32[B, T, M]
*0.gca.coarse.spread = qc.token_weights(*0.gca.coarse.weights, memory/last) : f32[B, T, M]
*1.gca.fine.attention = qc.memory_attention(*1.gca.fine.q_proj/transposed, *1.gca.fine.k_proj/transposed, *1.gca.fine.v_proj/transposed, memory/seen, prior=*0.gca.coarse.spread) : f32[B, T, 2, 16]
*1.gca.fine.add = qc.add_gated(*1/add.2, *1.gca.fine.o_proj, *1.gca.fine.gate: f32[1], memory/seen, sigmoid) : f32[B, T, 32]
*1.gca.coarse.attention = qc.memory_attention(*1.gca.coarse.q_proj/transposed, *1.gca.coarse.k_proj/transposed, *1.gca.coarse.v_proj/transposed, memory/last) : f32[B, T, 2, 16]
*1.gca.coarse.add = qc.add_gated(*1.gca.fine.add, *1.gca.coarse.o_proj, *1.gca.coarse.gate: f32[1], memory/last, sigmoid) : f32[B, T, 32]
*1.gca.coarse.weights = qc.document_weights(*1.gca.coarse.q_proj/transposed, *1.gca.coarse.k_proj/transposed, memory/last, True) : f32[B, T, M]
*1.gca.coarse.spread = qc.token_weights(*1.gca.coarse.weights, memory/last) : f32[B, T, M]
*2.gca.fine.attention = qc.memory_attention(*2.gca.fine.q_proj/transposed, *2.gca.fine.k_proj/transposed, *2.gca.fine.v_proj/transposed, memory/seen, prior=*1.gca.coarse.spread) : f32[B, T, 2, 16]
*2.gca.fine.add = qc.add_gated(*2/add.2, *2.gca.fine.o_proj, *2.gca.fine.gate: f32[1], memory/seen, sigmoid) : f32[B, T, 32]
""".strip()


def test_without_a_memory_the_logits_are_those_of_the_model_to_the_bit() -> None:
    ids = tokens()
    whole = run(qwen(3), input_ids=ids)
    assert torch.equal(run(decoder(), input_ids=ids), whole)
    assert torch.equal(run(decoder(), input_ids=ids, memory=memory()[:, :0]), whole)
    mixed = run(decoder(), input_ids=ids, memory=memory(), memory_mask=DOCUMENTS)
    assert torch.equal(mixed[2], whole[2])  # the row whose memory is padding
    assert not torch.equal(mixed[0], whole[0])


def test_what_comes_later_changes_nothing_before_it_unless_the_text_is_weighed_as_a_whole() -> None:
    ids = tokens()
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % 50
    for per_position, moved in ((True, False), (False, True)):
        graph = decoder(per_position)
        one, two = (run(graph, input_ids=i, memory=memory(), memory_mask=DOCUMENTS)[:2, :-1] for i in (ids, other))
        assert (float((one - two).abs().max()) > 1e-6) is moved


def test_numbers_of_documents_matter_and_their_order_does_not() -> None:
    graph, ids = decoder(), tokens()
    one = run(graph, input_ids=ids, memory=memory(), memory_mask=DOCUMENTS)
    all_one = run(graph, input_ids=ids, memory=memory(), memory_mask=DOCUMENTS.clamp(max=1))
    assert (one - all_one)[:2].abs().max() > 1e-3
    order = torch.tensor([2, 3, 4, 0, 1])
    moved = run(graph, input_ids=ids, memory=memory()[:, order], memory_mask=DOCUMENTS[:, order])
    assert (one - moved)[0].abs().max() < 1e-5


def test_gradients_reach_the_coarse_queries_through_the_weights_of_documents_alone() -> None:
    graph = decoder()
    graph.set_tensor("model.layers.0.gca.coarse.gate", torch.tensor([-1e4]))  # what it adds itself is shut
    weight = graph.tensor("model.layers.0.gca.coarse.q_proj.weight").requires_grad_()
    graph.set_tensor("model.layers.0.gca.coarse.q_proj.weight", weight)
    logits = graph(input_ids=tokens(), memory=memory(), memory_mask=DOCUMENTS)
    (grad,) = torch.autograd.grad(logits.square().sum(), graph.tensor("model.layers.0.gca.coarse.q_proj.weight"))
    assert grad.abs().max() > 0


def test_joined_to_an_encoder_the_chunks_of_a_row_are_its_documents() -> None:
    encoder = as_encoder(qwen())
    joint, _ = link(AttachMemory(), {"encoder": encoder, "decoder": decoder()})
    ids, mask = chunks()
    text = tokens(3)
    whole = run(joint, input_ids=text, memory_ids=ids, memory_attention=mask)
    states = run(encoder, input_ids=ids.flatten(0, 1), attention_mask=mask.flatten(0, 1)).unflatten(0, (3, 2))
    for row in range(3):
        parts = [states[row, chunk, mask[row, chunk].bool()] for chunk in range(2)]
        numbers = torch.cat([torch.full((len(part),), chunk + 1) for chunk, part in enumerate(parts)])
        given = {} if not len(numbers) else {"memory": torch.cat(parts)[None], "memory_mask": numbers[None]}
        alone = run(decoder(), input_ids=text[row : row + 1], **given)
        assert (alone[0] - whole[row]).abs().max() < 1e-5


def test_prepared_keys_and_values_give_what_the_memory_gives() -> None:
    graph = decoder()
    apply(HoistMemoryKv(), graph)
    given = prepare(graph, {"memory": memory(), "memory_mask": DOCUMENTS})
    ids = tokens()
    whole = run(decoder(), input_ids=ids, memory=memory(), memory_mask=DOCUMENTS)
    assert (run(graph, input_ids=ids, **given) - whole).abs().max() < 1e-5
    reader = part(graph)[1]
    found = run(reader, input_ids=ids, attention_mask=torch.ones_like(ids), **given)
    assert (found - whole).abs().max() < 1e-5


def test_an_artifact_of_it_is_read_back(tmp_path: Path) -> None:
    graph = decoder()
    save(tmp_path / "artifact", graph)
    read = load(tmp_path / "artifact").graph
    assert str(read) == str(graph)
    given = {"input_ids": tokens(), "memory": memory(), "memory_mask": DOCUMENTS}
    assert torch.equal(run(read, **given), run(graph, **given))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pairs": 0}, "pairs is 0\n  fix    give a number from 1"),
        ({"start": -1}, "start is -1\n  fix    give the number of a block, from 0 on"),
        ({"heads": 0}, "heads is 0\n  fix    give a number from 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(QcError) as caught:
        InsertStagedGca(**options)
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {},
            "4 pairs from block 6 on, 3 apart, end behind block 18; there are 3\n"
            "  fix    set start to 0, gap to 1 and pairs to at most 2",
        ),
        (
            {"start": 0, "gap": 1},
            "4 pairs from block 0 on, 1 apart, end behind block 4; there are 3\n"
            "  fix    set pairs to at most 2, or lower start or gap",
        ),
        (
            {"start": 0, "gap": 1, "pairs": 2, "heads": 3},
            "a width of 32 does not divide into 3 heads\n  fix    give head_dim",
        ),
    ],
)
def test_pairs_that_a_model_has_no_room_for_are_refused(options: dict[str, Any], said: str) -> None:
    errors = InsertStagedGca(**options).check(qwen(3))
    assert str(errors[0]) == said


def test_a_second_memory_is_refused() -> None:
    (error,) = STAGED.check(decoder())
    assert str(error) == "the graph reads a memory already\n  fix    take one of the two insert-gca out"
