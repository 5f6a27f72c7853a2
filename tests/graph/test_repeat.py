"""A model traced with three of its blocks is the model traced with all of them; where blocks differ, all are traced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from graph import Graph, capture, repeat, tracing

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64, "vocab_size": 50,
    "num_hidden_layers": 7, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def config(kind: str, **options: Any) -> Any:
    return AutoConfig.for_model(kind, **SIZES | options)


def traced(monkeypatch: pytest.MonkeyPatch, made: Any, **options: Any) -> tuple[Graph, list[int]]:
    """The graph, and how many blocks each trace had."""
    seen: list[int] = []
    exported = tracing._exported

    def watched(model: Any, *rest: Any) -> Any:
        seen.append(model.config.num_hidden_layers)
        return exported(model, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(tracing, "_exported", watched)
        return capture(made, **options), seen


QUICK = ("gpt2", "qwen3")


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in sorted(repeat.KNOWN)]
)
def test_the_graph_is_that_of_all_blocks_traced(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    short, blocks = traced(monkeypatch, config(kind))
    assert blocks == [3]
    monkeypatch.setattr(repeat, "LEAST", 1000)
    full, blocks = traced(monkeypatch, config(kind))
    assert blocks == [7]
    assert str(short) == str(full)
    assert short.tensors() == full.tensors()
    assert [(s.name, s.op, s.role, s.block) for s in short.sites()] == [
        (s.name, s.op, s.role, s.block) for s in full.sites()
    ]


def test_it_computes_what_the_model_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config("qwen3")).eval()
    graph, blocks = traced(monkeypatch, model)
    assert blocks == [3]
    ids = torch.randint(0, 50, (2, 9))
    with torch.no_grad():
        assert graph(input_ids=ids, attention_mask=torch.ones_like(ids)).equal(model(ids).logits)


@pytest.mark.parametrize(
    "options",
    [
        {"num_hidden_layers": 5},
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3},
    ],
    ids=["few blocks", "blocks with windows"],
)
def test_where_blocks_may_differ_all_are_traced(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made = config("qwen3", **options)
    assert traced(monkeypatch, made)[1] == [made.num_hidden_layers]


def test_blocks_that_are_made_of_other_numbers_are_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    made = config("gpt2", scale_attn_by_inverse_layer_idx=True)
    assert traced(monkeypatch, made)[1] == [7]
    monkeypatch.setattr(repeat, "_made_of", lambda block, number: [])
    assert traced(monkeypatch, made)[1] == [3, 7], "of the three, the second and the third were seen to differ"


def test_a_model_type_that_was_not_tried_is_traced_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    assert traced(monkeypatch, config("olmo2"))[1] == [7]
