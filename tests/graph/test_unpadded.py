"""Rows without their padding: the same values and gradients at tokens, and nothing computed for what is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from graph import Graph
from graph.joint import CHUNK_MASK
from graph.lora import write_in_place
from graph.unpadded import TOKENWISE, drop_padding, left_of_padding, pad_again, token_index, without_padding
from tests.passes.memories import chunks, joint, tokens


def read(mask: Tensor | None = None) -> dict[str, Tensor]:
    ids, given = chunks()
    return {"input_ids": tokens(), "memory_ids": ids, "memory_attention": given if mask is None else mask}


def gradients(graph: Graph, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the trained tensors, of a loss on every logit."""
    parameters = {name: p for name, p in graph.module.named_parameters() if p.requires_grad}
    graph.module.zero_grad(set_to_none=True)
    logits: Any = graph.module(**{"attention_mask": torch.ones_like(inputs["input_ids"]), **inputs})
    logits.logsumexp(-1).sum().backward()
    return {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}


def rewritten(attention: str = "causal") -> tuple[Graph, Graph]:
    """The joint graph, and its copy without padding."""
    before = joint()
    if attention != "causal":
        masking = before.site("encoder.model/attention_mask").node
        masking.args = (masking.args[0], attention, *masking.args[2:])
        before.verify()
    after = before.copy()
    write_in_place(after)
    assert without_padding(after, after.site(CHUNK_MASK).node) > 20
    return before, after


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("side", ["right", "left", "none"])
def test_values_and_gradients_are_those_of_padded_rows(attention: str, side: str) -> None:
    before, after = rewritten(attention)
    mask = {"right": chunks()[1], "left": chunks()[1].flip(2), "none": torch.ones_like(chunks()[1])}[side]
    inputs = read(mask)
    with torch.no_grad():
        ours, theirs = before(**inputs), after(**inputs)
        assert (ours - theirs).abs().max() <= 1e-6
        assert (ours - before(input_ids=inputs["input_ids"])).abs().max() > 1e-3, "the memory is read"
    wanted, found = gradients(before, inputs), gradients(after, inputs)
    assert wanted.keys() == found.keys()
    assert any("lora" in name for name in wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_without_chunks_and_with_an_empty_batch_it_is_the_same_to_the_bit() -> None:
    before, after = rewritten()
    plain = {"input_ids": tokens()}
    empty = read(torch.zeros_like(chunks()[1]))
    with torch.no_grad():
        for inputs in (plain, empty):
            assert torch.equal(before(**inputs), after(**inputs))


def test_between_attentions_only_tokens_are_computed() -> None:
    _, after = rewritten()
    site = after.site("encoder.model.layers.1.mlp.up_proj")
    after.set_outputs([site.node])
    after.verify()
    with torch.no_grad():
        rows = tuple(after(**read()).shape)
    ids, mask = chunks()
    kept = int(mask.sum()) + int((mask.flatten(0, 1).sum(1) == 0).sum())  # an empty chunk keeps one token
    assert rows == (kept, 64)
    assert kept < 0.6 * ids.numel()


def test_each_value_is_moved_once_in_each_direction() -> None:
    _, after = rewritten()
    text = str(after)
    block = [line for line in text.split("\n") if line.startswith("encoder.model.layers.0.")]
    moved = [
        line.split(" = ")[0].removeprefix("encoder.model.layers.0.") for line in block if "padd" in line.split("(")[0]
    ]
    assert moved == [
        "self_attn.q_proj/lora.default/padded",
        "self_attn.k_proj/lora.default/padded",
        "self_attn.v_proj/lora.default/padded",
        "self_attn/reshape/tokens",
    ]
    assert text.count("qc.token_index(") == 1
    inside = [s for s in after.sites(*TOKENWISE) if s.name.startswith("encoder.model.layers.0.mlp")]
    assert {s.node.meta["val"].dim() for s in inside} == {2}
    assert {s.node.meta["val"].dim() for s in after.sites("aten.linear") if s.name.startswith("decoder.")} == {3}


def test_the_ops_are_each_others_way_back() -> None:
    mask = torch.tensor([[1, 1, 0], [0, 2, 0]])
    x = torch.randn(2, 3, 4, requires_grad=True)
    index = token_index(mask)
    assert index.tolist() == [0, 1, 4]
    again = pad_again(drop_padding(x, index), index, mask)
    assert torch.equal(again, x * (mask > 0)[:, :, None])
    again.square().sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, 2 * x.detach() * (mask > 0)[:, :, None])


def test_padding_on_the_right_needs_no_mask_and_any_other_does() -> None:
    right, left = torch.tensor([[1, 1, 0], [1, 0, 0]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    assert left_of_padding(right).all()
    assert left_of_padding(left) is left
    between = torch.tensor([[1, 0, 1]])
    assert left_of_padding(between) is between
    documents = torch.tensor([[1, 1, 2]])
    assert left_of_padding(documents) is documents
