"""Joining an encoder to a decoder, projecting what it gives, and working keys and values out beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graph import Graph, QcError, Selector
from graph.artifact import load, save
from graph.cache import Cache
from graph.encoder import as_encoder, set_attention
from graph.joint import take_apart
from graph.prepared import part, prepare
from graph.text import diff
from passes.attach_memory import AttachMemory
from passes.hoist_memory_kv import HoistMemoryKv
from passes.insert_gca import InsertGca
from passes.insert_kv_cache import InsertKvCache
from passes.insert_kv_projection import InsertKvProjection
from passes.runner import apply, link
from tests.graph.tiny import qwen
from tests.passes.memories import chunks, decoder, joint, memory, tokens


def run(graph: Graph, **inputs: Any) -> Any:
    with torch.no_grad():
        return graph(**inputs)


# -- attach-memory --------------------------------------------------------------------------------------------------


def test_the_encoder_reads_chunks_and_the_decoder_what_comes_of_them() -> None:
    graph = joint()
    lines = [line for line in str(graph).splitlines() if line.startswith(("memory", "decoder.memory"))]
    assert "\n".join(lines) == PICTURE
    assert graph.blocks == 4
    assert graph.kind == "causal-lm"
    assert {site.stack for site in graph.sites() if site.name.startswith("encoder.")} == {0}
    assert {site.block for site in graph.sites() if site.name.startswith("decoder.model.layers")} == {2, 3}


PICTURE = """
memory_ids: i64[B, C, S] = None
memory_attention: i64[B, C, S] = None
memory/batch = sym_size.int(input_ids, 0) : int B
memory/chunk_ids = qc.chunk_ids(memory_ids) : i64[B*C, S]
memory/chunk_mask = qc.chunk_mask(memory_attention, memory/chunk_ids) : i64[B*C, S]
memory/joined = qc.join_chunks(encoder.model.norm, memory_ids, memory_attention, memory/batch, None) : f32[B, S*C, 32]
memory/joined_mask = qc.joined_mask(memory_ids, memory_attention, memory/chunk_ids, memory/batch, None) : i64[B, S*C]
decoder.memory/batch = sym_size.int(input_ids, 0) : int B
decoder.memory/tokens = qc.memory_tokens(memory/joined, decoder.memory/batch, 32, model) : f32[B, S*C, 32]
decoder.memory/seen = qc.memory_seen(memory/joined_mask, decoder.memory/tokens) : bool[B, S*C]
""".strip()


def test_padding_is_dropped_and_chunks_are_joined_in_order() -> None:
    ids, mask = chunks()
    encoder, inner = as_encoder(qwen()), decoder()
    first, second = run(encoder, input_ids=ids[0, 0, :4][None]), run(encoder, input_ids=ids[0, 1][None])
    alone = run(inner, input_ids=tokens()[:1], memory=torch.cat((first, second), dim=1))
    found = run(joint(), input_ids=tokens(), memory_ids=ids, memory_attention=mask)
    assert (found[0] - alone[0]).abs().max() <= 1e-5
    assert torch.equal(found[1], run(qwen(), input_ids=tokens())[1]), "a row without text is as without memory"


def test_without_chunks_it_is_the_decoder_to_the_bit() -> None:
    ids, _ = chunks()
    whole = run(qwen(), input_ids=tokens())
    assert torch.equal(run(joint(), input_ids=tokens()), whole)
    assert torch.equal(run(joint(), input_ids=tokens(), memory_ids=ids[:, :0]), whole)


def test_gradients_pass_into_the_encoder() -> None:
    ids, mask = chunks()
    graph = joint()
    graph(input_ids=tokens(), memory_ids=ids, memory_attention=mask).pow(2).sum().backward()
    updates = [p for name, p in graph.module.named_parameters() if "lora_B" in name]
    assert min(float(p.grad.norm()) for p in updates if p.grad is not None) > 0
    assert all(p.grad is not None for p in updates)
    assert all(bool(torch.isfinite(p.grad).all()) for p in updates if p.grad is not None)


def test_a_memory_may_be_cut() -> None:
    ids, mask = chunks()
    graph, _ = link(AttachMemory(max_tokens=3), {"encoder": as_encoder(qwen()), "decoder": decoder()})
    first = run(as_encoder(qwen()), input_ids=ids[0, 0, :3][None])
    alone = run(decoder(), input_ids=tokens()[:1], memory=first)
    found = run(graph, input_ids=tokens(), memory_ids=ids, memory_attention=mask)
    assert (found[0] - alone[0]).abs().max() <= 1e-5


def test_an_artifact_holds_both(tmp_path: Path) -> None:
    ids, mask = chunks()
    given = {"input_ids": tokens(), "memory_ids": ids, "memory_attention": mask}
    again = save(tmp_path / "artifact", joint()).graph.materialize()
    assert str(load(tmp_path / "artifact").graph) == str(joint())
    assert torch.equal(run(again, **given), run(joint(), **given))


def test_an_encoder_may_look_both_ways() -> None:
    ids = tokens(1, 6)
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + 1) % 50
    for attention, moves in (("causal", False), ("bidirectional", True)):
        encoder = set_attention(as_encoder(qwen()), attention)  # type: ignore[arg-type]
        early = (run(encoder, input_ids=ids) - run(encoder, input_ids=other))[0, :5]
        assert bool(early.abs().max() > 1e-4) == moves


@pytest.mark.parametrize("width", [20, 40])
def test_an_encoder_of_another_width_is_projected(width: int) -> None:
    inner, encoder = qwen(), as_encoder(qwen())
    apply(InsertGca(layers=(0,), width=width), inner)
    before = str(encoder)
    graph, report = link(AttachMemory(), {"encoder": encoder, "decoder": inner})
    assert str(encoder) == before, "the graph that was given stays as it is"
    assert report.figures["bridge"] == f"32 to {width}"
    assert "encoder.memory = linear(encoder.model.norm, encoder.memory/cast)" in str(graph)
    weight = graph.tensor("encoder.memory.weight")
    assert torch.equal(weight, torch.eye(width, 32))
    info = graph.info("encoder.memory.weight")
    assert (info.group, info.trainable, info.pinned) == ("encoder.memory", True, True)
    ids, mask = chunks()
    given = {"input_ids": tokens(), "memory_ids": ids, "memory_attention": mask}
    states = run(as_encoder(qwen()), input_ids=ids[0, 1][None])
    cut = torch.nn.functional.pad(states, (0, width - 32))
    alone = run(inner, input_ids=tokens()[:1], memory=cut)
    found = run(graph, input_ids=tokens()[:1], memory_ids=ids[:1, 1:], memory_attention=mask[:1, 1:])
    assert (found - alone).abs().max() <= 1e-5
    graph(**given).pow(2).sum().backward()
    moved = dict(graph.module.named_parameters())["encoder.memory.weight"].grad
    assert moved is not None and float(moved.norm()) > 0


def _refusal(encoder: Graph, inner: Graph, step: AttachMemory | None = None) -> str:
    with pytest.raises(QcError) as caught:
        link(step or AttachMemory(), {"encoder": encoder, "decoder": inner})
    return str(caught.value)


def test_graphs_that_do_not_go_together_are_refused() -> None:
    narrow = qwen()
    apply(InsertGca(layers=(0,), width=20), narrow)
    assert _refusal(as_encoder(qwen()), qwen()) == ("the decoder reads no memory\n  fix    run insert-gca on it first")
    assert _refusal(qwen(), decoder()) == (
        "the encoder is a graph of kind causal-lm, and gives no states\n"
        "  fix    give the model kind: encoder under models:"
    )
    assert _refusal(as_encoder(qwen()), narrow, AttachMemory(bridge=False)) == (
        "the encoder gives states of width 32, and the decoder reads a memory of width 20\n"
        "  fix    set width: 32 in insert-gca, or add insert-kv-projection with width: 20"
    )
    assert _refusal(as_encoder(qwen()), decoder(), AttachMemory(encoder="reader")) == (
        "encoder 'reader' is none of the models\n  fix    they are encoder, decoder"
    )


def test_one_graph_alone_cannot_be_joined() -> None:
    with pytest.raises(QcError) as caught:
        apply(AttachMemory(), qwen())
    assert str(caught.value) == (
        "attach-memory joins two models, and there is one\n  fix    give the recipe models:, and no on:"
    )


# -- insert-kv-projection -------------------------------------------------------------------------------------------


def test_projections_begin_as_the_identity() -> None:
    graph = as_encoder(qwen())
    before, states = str(graph), run(graph, input_ids=tokens())
    apply(InsertKvProjection(), graph)
    assert all(torch.equal(value, states) for value in run(graph, input_ids=tokens()))
    lines = [line for line in diff(before, str(graph)).splitlines()[2:] if line[0] in "+-"]
    assert "\n".join(lines) == PROJECTIONS


PROJECTIONS = """
-return model.norm
+memory_key/cast = to.dtype(memory_key.weight: f32[32, 32], model) : f32[32, 32]
+memory_key = linear(model.norm, memory_key/cast) : f32[B, T, 32]
+memory_value/cast = to.dtype(memory_value.weight: f32[32, 32], model) : f32[32, 32]
+memory_value = linear(model.norm, memory_value/cast) : f32[B, T, 32]
+return memory_key, memory_value
""".strip()


@pytest.mark.parametrize("width", [20, 40])
def test_they_bridge_widths_by_cutting_or_zeros(width: int) -> None:
    encoder, inner = as_encoder(qwen()), qwen()
    states = run(encoder, input_ids=tokens())
    apply(InsertKvProjection(width=width), encoder)
    key, value = run(encoder, input_ids=tokens())
    assert torch.equal(key, torch.nn.functional.pad(states, (0, width - 32)))
    assert torch.equal(value, key)
    apply(InsertGca(layers=(0,), width=width, separate_values=True), inner)
    graph, _ = link(AttachMemory(), {"encoder": encoder, "decoder": inner})
    assert graph.info("encoder.memory_key.weight").group == "encoder.memory"
    ids, mask = chunks()
    assert run(graph, input_ids=tokens(), memory_ids=ids, memory_attention=mask).shape == (3, 7, 50)


def test_two_values_need_a_decoder_that_reads_two() -> None:
    encoder = as_encoder(qwen())
    apply(InsertKvProjection(), encoder)
    assert _refusal(encoder, decoder()) == (
        "the encoder gives 2 values, and the decoder reads 1 memories\n"
        "  fix    set separate_values in insert-gca where insert-kv-projection is used, and only there"
    )


def test_projections_have_a_place_in_an_encoder_only_and_once() -> None:
    graph = as_encoder(qwen())
    apply(InsertKvProjection(), graph)
    with pytest.raises(QcError) as caught:
        apply(InsertKvProjection(), graph)
    assert str(caught.value) == ("the encoder returns keys and values already\n  fix    take insert-kv-projection out")
    with pytest.raises(QcError) as caught:
        apply(InsertKvProjection(), qwen())
    assert str(caught.value) == (
        "the graph is a language model, not an encoder\n  fix    give it kind: encoder under models:"
    )
    with pytest.raises(QcError) as caught:
        InsertKvProjection(width=0)
    assert str(caught.value) == "width is 0\n  fix    give a number from 1; the width of the decoder is usual"


# -- hoist-memory-kv ------------------------------------------------------------------------------------------------


def hoisted(graph: Graph) -> Graph:
    apply(HoistMemoryKv(), graph)
    return graph


def test_attention_takes_keys_and_values_that_are_given() -> None:
    graph = decoder()
    before = str(graph)
    report = apply(HoistMemoryKv(), graph)
    lines = [line for line in diff(before, str(graph)).splitlines()[2:] if line[0] in "+-"]
    found = "\n".join(line for line in lines if "layers.1" not in line and "_1:" not in line)
    assert found.replace("model.layers.0.gca", "*") == HOISTED
    assert report.figures == {"attentions": 2}
    assert apply(HoistMemoryKv(), graph).changed == ()


HOISTED = """
+memory_key_0: f32[B, 1, M, 16] = None
+memory_value_0: f32[B, 1, M, 16] = None
-*.attention = qc.memory_attention(*.q_proj/transposed, *.k_proj/transposed, *.v_proj/transposed, memory/seen) : f32[B, T, 2, 16]
+*.attention.key = qc.prepared(*.k_proj/transposed, memory_key_0) : f32[B, 1, M, 16]
+*.attention.value = qc.prepared(*.v_proj/transposed, memory_value_0) : f32[B, 1, M, 16]
+*.attention = qc.memory_attention(*.q_proj/transposed, *.attention.key, *.attention.value, memory/seen) : f32[B, T, 2, 16]
""".strip()


def test_prepared_keys_and_values_give_the_same_logits() -> None:
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[1] = 0
    graph = hoisted(decoder())
    given = prepare(graph, {"memory": memory(), "memory_mask": mask})
    whole = run(decoder(), input_ids=tokens(), memory=memory(), memory_mask=mask)
    assert (run(graph, input_ids=tokens(), **given) - whole).abs().max() <= 1e-5
    ids, padding = chunks()
    both = hoisted(joint())
    of_chunks = prepare(both, {"memory_ids": ids, "memory_attention": padding})
    expected = run(joint(), input_ids=tokens(), memory_ids=ids, memory_attention=padding)
    assert (run(both, input_ids=tokens(), **of_chunks) - expected).abs().max() <= 1e-5


def test_a_decoder_parts_into_what_prepares_and_what_reads() -> None:
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[2, 3:] = 0
    graph = hoisted(decoder())
    maker, reader = part(graph)
    assert maker.inputs == ("memory",)
    assert reader.inputs[2:] == ("memory_mask", "memory_key_0", "memory_value_0", "memory_key_1", "memory_value_1")
    assert not [name for name in reader.tensors() if "k_proj" in name and "gca" in name]
    made: tuple[Tensor, ...] = run(maker, memory=memory())
    given = dict(zip(reader.inputs[3:], made, strict=True))
    ids = tokens()
    found = run(reader, input_ids=ids, attention_mask=torch.ones_like(ids), memory_mask=mask, **given)
    assert (found - run(decoder(), input_ids=ids, memory=memory(), memory_mask=mask)).abs().max() <= 1e-5


def test_a_cache_and_prepared_keys_go_together() -> None:
    graph = hoisted(decoder())
    given = prepare(graph, {"memory": memory()})
    apply(InsertKvCache(), graph)
    ids = tokens()
    store = Cache(graph, 3, 7)
    with torch.no_grad():
        pieces = [store.run(ids[:, at : at + 1], torch.ones(3, 1, dtype=torch.long), **given) for at in range(7)]
    assert (torch.cat(pieces, dim=1) - run(decoder(), input_ids=ids, memory=memory())).abs().max() <= 1e-5


def test_only_a_graph_with_a_memory_can_be_prepared_and_only_whole() -> None:
    with pytest.raises(QcError) as caught:
        apply(HoistMemoryKv(), qwen())
    assert str(caught.value) == (
        "the graph reads no memory\n  fix    run insert-gca first, or leave hoist-memory-kv out"
    )
    with pytest.raises(QcError) as caught:
        apply(HoistMemoryKv(select=Selector(block=0)), decoder())
    assert str(caught.value) == (
        "select leaves out model.layers.1.gca.attention\n"
        "  site   model.layers.1.gca.attention\n"
        "  fix    remove select: all of them are prepared, or none"
    )


# -- taking apart ---------------------------------------------------------------------------------------------------


def test_a_joint_graph_comes_apart_into_the_graphs_it_was_made_of() -> None:
    encoder, inner = take_apart(joint())
    assert str(inner) == str(decoder())
    assert (encoder.kind, inner.kind) == ("encoder", "causal-lm")
    assert (encoder.blocks, inner.blocks) == (2, 2)
    assert encoder.inputs == ("input_ids", "attention_mask")
    assert inner.config == decoder().config
    again, _ = link(AttachMemory(), {"encoder": encoder, "decoder": inner})
    assert str(again) == str(joint())
    assert again.tensors() == joint().tensors()
