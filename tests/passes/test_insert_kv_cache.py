"""A graph with a cache computes what the graph without one does, and what cannot have one is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from graph import Graph, QcError, Selector, capture
from graph.artifact import load, save
from graph.cache import Cache
from graph.text import diff
from passes.insert_kv_cache import InsertKvCache
from passes.runner import apply
from tests.architectures import config

CACHED = ("qwen3", "llama", "gemma2", "gpt2", "opt", "mistral", "phi", "gpt_neox")


@cache
def model(name: str) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config(name)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return made


@cache
def _captured(name: str) -> Graph:
    return capture(model(name), kind="causal-lm")


def plain(name: str) -> Graph:
    return _captured(name).copy()


def cached(name: str) -> Graph:
    graph = plain(name)
    apply(InsertKvCache(), graph)
    return graph


def tokens(batch: int = 3, length: int = 20) -> tuple[Tensor, Tensor]:
    """Tokens, and a mask with padding on the left of two rows."""
    ids = torch.randint(5, 99, (batch, length))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[2, :1] = 0
    return ids, mask


def decode(graph: Graph, ids: Tensor, mask: Tensor, *, prompt: int, first: Tensor | None = None) -> Tensor:
    """The logits of a prompt read in two pieces, and then of one token at a time."""
    store = Cache(graph, len(ids), ids.shape[1])
    borders = [0, prompt // 2, *range(prompt, ids.shape[1] + 1)]
    with torch.no_grad():
        pieces = [
            store.run(ids[:, a:b], mask[:, a:b], None if first is None else first + a) for a, b in pairwise(borders)
        ]
    return torch.cat(pieces, dim=1)


def test_positions_mask_and_attention_read_the_past() -> None:
    graph = plain("qwen3")
    before = str(graph)
    report = apply(InsertKvCache(), graph)
    lines = [line for line in diff(before, str(graph)).splitlines()[2:] if line[0] in "+-"]
    first = [line for line in lines if ".layers.1." not in line]
    second = [line for line in lines if ".layers.1." in line]
    assert report.changed == ("model.layers.0.self_attn/attention", "model.layers.1.self_attn/attention")
    assert "\n".join(first).replace("model.layers.0.self_attn/", "*") == PICTURE
    assert [line.replace("layers.1", "layers.0").replace("_1", "_0") for line in second] == first[-4:]


PICTURE = dedent("""
    +past_mask: i64[B, N] = None
    +first_position: i64[1] = None
    +past_key_0: f32[B, 2, S, 16] = None
    +past_value_0: f32[B, 2, S, 16] = None
    +past_key_1: f32[B, 2, S, 16] = None
    +past_value_1: f32[B, 2, S, 16] = None
    -model/arange = arange(sym_size.2) : i64[T]
    -model/unsqueeze = unsqueeze(model/arange, 0) : i64[1, T]
    -model/attention_mask = qc.attention_mask(attention_mask) : bool[B, 1, T, T]
    -model.rotary_emb/unsqueeze = unsqueeze(model/unsqueeze, 2) : i64[1, T, 1]
    +model/positions = qc.positions(input_ids, past_mask, first_position) : i64[1, T]
    +model/cached_attention_mask = qc.cached_attention_mask(attention_mask, past_mask) : bool[B, 1, T, T + N]
    +model.rotary_emb/unsqueeze = unsqueeze(model/positions, 2) : i64[1, T, 1]
    -*attention = qc.attention(*rope, *rope.2, *transpose.3, model/attention_mask, 0.25) : f32[B, T, 4, 16]
    +*attention.key = qc.update_cache(*rope.2, past_key_0, past_mask) : f32[B, 2, T + N, 16]
    +*attention.value = qc.update_cache(*transpose.3, past_value_0, past_mask) : f32[B, 2, T + N, 16]
    +*attention = qc.attention(*rope, *attention.key, *attention.value, model/cached_attention_mask, 0.25) : f32[B, T, 4, 16]
""").strip()


def test_a_second_run_finds_nothing_to_do() -> None:
    graph = cached("qwen3")
    text = str(graph)
    assert apply(InsertKvCache(), graph).changed == ()
    assert str(graph) == text


@pytest.mark.parametrize("name", CACHED)
def test_reading_in_pieces_gives_the_logits_of_reading_at_once(name: str) -> None:
    ids, padded = tokens()
    before, graph = plain(name), cached(name)
    for mask in (torch.ones_like(ids), padded):
        with torch.no_grad():
            whole = before(input_ids=ids, attention_mask=mask)
            assert torch.equal(graph(input_ids=ids, attention_mask=mask), whole)
        pieces = decode(graph, ids, mask, prompt=12)
        assert (pieces - whole)[mask.bool()].abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "opt"])
def test_a_row_padded_on_the_left_gets_the_logits_it_gets_alone(name: str) -> None:
    ids, mask = tokens()
    padding = (mask == 0).sum(1)
    together = decode(cached(name), ids, mask, prompt=12, first=-padding)
    for row, pad in enumerate(padding.tolist()):
        with torch.no_grad():
            alone = plain(name)(input_ids=ids[row : row + 1, pad:])
        assert (together[row : row + 1, pad:] - alone).abs().max() <= 1e-5


def test_documents_in_one_row_do_not_see_each_other_across_the_cache() -> None:
    ids = torch.randint(5, 99, (1, 12))
    mask = torch.tensor([[1] * 5 + [2] * 7])
    with torch.no_grad():
        whole = plain("qwen3")(input_ids=ids, attention_mask=mask)
    assert (decode(cached("qwen3"), ids, mask, prompt=8) - whole).abs().max() <= 1e-5


def test_the_cache_is_written_in_place_and_read_as_a_view() -> None:
    graph = cached("qwen3")
    ids = torch.randint(5, 99, (2, 6))
    store = Cache(graph, 2, 8)
    places = {name: buffer.data_ptr() for name, buffer in store.buffers.items()}
    with torch.no_grad():
        store.run(ids, torch.ones_like(ids))
        update = graph.sites("qc.update_cache")[0].node.target
        assert callable(update)
        new = torch.ones(2, 2, 1, 16)
        seen = update(new, store.buffers["past_key_0"], store.mask[:, :6])
    assert {name: buffer.data_ptr() for name, buffer in store.buffers.items()} == places
    assert seen.data_ptr() == places["past_key_0"]
    assert seen.shape == (2, 2, 7, 16)
    assert torch.equal(seen[:, :, 6:], new)
    assert store.filled == 6


def test_a_graph_moved_to_bf16_keeps_its_cache_in_bf16() -> None:
    ids = torch.randint(5, 99, (1, 10))
    graph = cached("qwen3").to(torch.bfloat16)
    with torch.no_grad():
        whole = graph(input_ids=ids)
    assert {b.dtype for b in Cache(graph, 1, 4).buffers.values()} == {torch.bfloat16}
    assert (decode(graph, ids, torch.ones_like(ids), prompt=6) - whole).abs().max() < 0.1


def test_an_artifact_holds_the_cache(tmp_path: Path) -> None:
    graph = cached("qwen3")
    ids = torch.randint(5, 99, (1, 10))
    again = save(tmp_path / "artifact", graph).graph.materialize()
    assert str(load(tmp_path / "artifact").graph) == str(graph)
    one = torch.ones_like(ids)
    assert torch.equal(decode(again, ids, one, prompt=6), decode(graph, ids, one, prompt=6))


def test_a_plan_without_weights_is_rewritten_too() -> None:
    graph = capture(config("qwen3"), kind="causal-lm")
    assert apply(InsertKvCache(), graph).figures == {"caches": 2}


# -- what is refused ------------------------------------------------------------------------------------------------


def hidden(graph: Graph) -> fx.Node:
    return graph.site("model.layers.0/add").node


def splice(op: str, *args: Any) -> Callable[[Graph], None]:
    """Put ``op(x, *args)`` into the residual stream, broadcast back to its shape."""

    def edit(graph: Graph) -> None:
        x = hidden(graph)
        last = graph.site("model.layers.0/add.2").node
        new = graph.insert(op, x, *args, name="spliced", before=last)
        both = graph.insert("aten.add.Tensor", x, new, name="added", before=last)
        last.update_arg(0, both)

    return edit


def scale_by_length(graph: Graph) -> None:
    last = graph.site("model.layers.0/add.2").node
    length = graph.site("sym_size.2").node
    last.update_arg(0, graph.insert("aten.mul.Tensor", hidden(graph), length, name="spliced", before=last))


def count_from_zero(graph: Graph) -> None:
    last = graph.site("model.layers.0/add.2").node
    length = graph.site("sym_size.2").node
    steps = graph.insert("aten.arange", length, name="spliced", before=last)
    column = graph.insert("aten.unsqueeze", steps, 1, name="column", before=last)
    last.update_arg(0, graph.insert("aten.mul.Tensor", hidden(graph), column, name="scaled", before=last))


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (splice("aten.mean.dim", [1], True), "makes one value of all tokens (aten.mean.dim)"),
        (splice("aten.cumsum", 1), "runs along the tokens (aten.cumsum)"),
        (splice("aten.flip", [1]), "runs along the tokens (aten.flip)"),
        (splice("aten.softmax.int", 1), "runs along the tokens (aten.softmax.int)"),
        (splice("aten.slice.Tensor", 1, 0, 1), "makes one value of all tokens (aten.slice.Tensor)"),
        (scale_by_length, "computes with the number of tokens (aten.mul.Tensor)"),
        (count_from_zero, "counts tokens from the start of what it is given (aten.arange)"),
    ],
)
def test_what_looks_from_one_token_to_another_is_refused(edit: Callable[[Graph], None], why: str) -> None:
    graph = plain("qwen3")
    edit(graph)
    graph.verify()
    with pytest.raises(QcError) as caught:
        apply(InsertKvCache(), graph)
    assert str(caught.value) == (
        f"spliced {why}\n"
        "  site   spliced\n"
        "  fix    leave insert-kv-cache out: generation then reads everything again for each token"
    )


def test_an_attention_of_its_own_making_is_refused() -> None:
    graph = plain("qwen3")
    for site in graph.sites("qc.attention"):
        site.node.target, site.node.args = torch.ops.aten.scaled_dot_product_attention.default, site.node.args[:3]
    with pytest.raises(QcError) as caught:
        apply(InsertKvCache(), graph)
    assert str(caught.value) == (
        "the attention of this model is not one op, so its keys cannot be cached\n"
        "  fix    leave insert-kv-cache out: generation then reads everything again for each token"
    )


def test_every_attention_with_a_mask_of_its_own_making_is_named() -> None:
    graph = plain("qwen3")
    mask = graph.site("model/attention_mask")
    mask.node.args = (*mask.node.args, "bidirectional")
    with pytest.raises(QcError) as caught:
        apply(InsertKvCache(), graph)
    assert str(caught.value) == "\n\n".join(
        f"model.layers.{i}.self_attn/attention has a mask of its own making, model/attention_mask\n"
        f"  site   model.layers.{i}.self_attn/attention\n"
        "  fix    leave insert-kv-cache out: generation then reads everything again for each token"
        for i in range(2)
    )


def test_an_encoder_is_refused() -> None:
    graph = plain("qwen3")
    graph.kind = "encoder"
    with pytest.raises(QcError) as caught:
        apply(InsertKvCache(), graph)
    assert str(caught.value) == (
        "only a decoder of tokens can have a key/value cache\n  fix    leave insert-kv-cache out"
    )


def test_a_selection_that_leaves_an_attention_out_is_refused() -> None:
    with pytest.raises(QcError) as caught:
        apply(InsertKvCache(select=Selector(block=(0,))), plain("qwen3"))
    assert str(caught.value) == (
        "select leaves out the attention model.layers.1.self_attn/attention\n"
        "  site   model.layers.1.self_attn/attention\n"
        "  fix    remove select: all attentions have a past, or none"
    )
