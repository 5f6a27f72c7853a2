"""The text of a graph is stable: the same for the same graph, in any process, before and after anything that is no change."""

from __future__ import annotations

from textwrap import dedent

import torch
from torch import nn

from graph import capture, capture_module
from graph.text import diff
from tests.graph.tiny import model, qwen

GOLDEN = (
    dedent("""
    input_ids: i64[B, T]
    attention_mask: i64[B, T]
    sym_size = sym_size.int(input_ids, 0) : int B
    sym_size.2 = sym_size.int(input_ids, 1) : int T
    model.embed_tokens = embedding(model.embed_tokens.weight: f32[50, 32], input_ids) : f32[B, T, 32]
    model/arange = arange(sym_size.2) : i64[T]
    model/unsqueeze = unsqueeze(model/arange, 0) : i64[1, T]
    model/attention_mask = qc.attention_mask(attention_mask) : bool[B, 1, T, T]
    model.rotary_emb/unsqueeze = unsqueeze(model/unsqueeze, 2) : i64[1, T, 1]
    model.rotary_emb/to = to.dtype(model.rotary_emb/unsqueeze, f32) : f32[1, T, 1]
    model.rotary_emb/mul = mul.Tensor(model.rotary_emb/to, model.rotary_emb.inv_freq: f32[8]) : f32[1, T, 8]
    model.rotary_emb/cat = cat([model.rotary_emb/mul, model.rotary_emb/mul], -1) : f32[1, T, 16]
    model.rotary_emb/cos = cos(model.rotary_emb/cat) : f32[1, T, 16]
    model.rotary_emb/mul.2 = mul.Tensor(model.rotary_emb/cos, 1.0) : f32[1, T, 16]
    model.rotary_emb/sin = sin(model.rotary_emb/cat) : f32[1, T, 16]
    model.rotary_emb/mul.3 = mul.Tensor(model.rotary_emb/sin, 1.0) : f32[1, T, 16]
    model.rotary_emb/to.2 = to.dtype(model.rotary_emb/mul.2, model) : f32[1, T, 16]
    model.rotary_emb/to.3 = to.dtype(model.rotary_emb/mul.3, model) : f32[1, T, 16]
    LAYER.input_layernorm = qc.rms_norm(model.embed_tokens, LAYER.input_layernorm.weight: f32[32], 1e-06) : f32[B, T, 32]
    LAYER.self_attn.q_proj = linear(LAYER.input_layernorm, LAYER.self_attn.q_proj.weight: f32[32, 32]) : f32[B, T, 32]
    LAYER.self_attn/view = view(LAYER.self_attn.q_proj, [sym_size, sym_size.2, -1, 16]) : f32[B, T, 2, 16]
    LAYER.self_attn.q_norm = qc.rms_norm(LAYER.self_attn/view, LAYER.self_attn.q_norm.weight: f32[16], 1e-06) : f32[B, T, 2, 16]
    LAYER.self_attn/transpose = transpose.int(LAYER.self_attn.q_norm, 1, 2) : f32[B, 2, T, 16]
    LAYER.self_attn.k_proj = linear(LAYER.input_layernorm, LAYER.self_attn.k_proj.weight: f32[16, 32]) : f32[B, T, 16]
    LAYER.self_attn/view.2 = view(LAYER.self_attn.k_proj, [sym_size, sym_size.2, -1, 16]) : f32[B, T, 1, 16]
    LAYER.self_attn.k_norm = qc.rms_norm(LAYER.self_attn/view.2, LAYER.self_attn.k_norm.weight: f32[16], 1e-06) : f32[B, T, 1, 16]
    LAYER.self_attn/transpose.2 = transpose.int(LAYER.self_attn.k_norm, 1, 2) : f32[B, 1, T, 16]
    LAYER.self_attn.v_proj = linear(LAYER.input_layernorm, LAYER.self_attn.v_proj.weight: f32[16, 32]) : f32[B, T, 16]
    LAYER.self_attn/view.3 = view(LAYER.self_attn.v_proj, [sym_size, sym_size.2, -1, 16]) : f32[B, T, 1, 16]
    LAYER.self_attn/transpose.3 = transpose.int(LAYER.self_attn/view.3, 1, 2) : f32[B, 1, T, 16]
    LAYER.self_attn/rope = qc.rope(LAYER.self_attn/transpose, model.rotary_emb/to.2, model.rotary_emb/to.3) : f32[B, 2, T, 16]
    LAYER.self_attn/rope.2 = qc.rope(LAYER.self_attn/transpose.2, model.rotary_emb/to.2, model.rotary_emb/to.3) : f32[B, 1, T, 16]
    LAYER.self_attn/attention = qc.attention(LAYER.self_attn/rope, LAYER.self_attn/rope.2, LAYER.self_attn/transpose.3, model/attention_mask, 0.25) : f32[B, T, 2, 16]
    LAYER.self_attn/reshape = reshape(LAYER.self_attn/attention, [sym_size, sym_size.2, -1]) : f32[B, T, 32]
    LAYER.self_attn.o_proj = linear(LAYER.self_attn/reshape, LAYER.self_attn.o_proj.weight: f32[32, 32]) : f32[B, T, 32]
    LAYER/add = add.Tensor(model.embed_tokens, LAYER.self_attn.o_proj) : f32[B, T, 32]
    LAYER.post_attention_layernorm = qc.rms_norm(LAYER/add, LAYER.post_attention_layernorm.weight: f32[32], 1e-06) : f32[B, T, 32]
    LAYER.mlp.gate_proj = linear(LAYER.post_attention_layernorm, LAYER.mlp.gate_proj.weight: f32[64, 32]) : f32[B, T, 64]
    LAYER.mlp.act_fn = silu(LAYER.mlp.gate_proj) : f32[B, T, 64]
    LAYER.mlp.up_proj = linear(LAYER.post_attention_layernorm, LAYER.mlp.up_proj.weight: f32[64, 32]) : f32[B, T, 64]
    LAYER.mlp = mul.Tensor(LAYER.mlp.act_fn, LAYER.mlp.up_proj) : f32[B, T, 64]
    LAYER.mlp.down_proj = linear(LAYER.mlp, LAYER.mlp.down_proj.weight: f32[32, 64]) : f32[B, T, 32]
    LAYER/add.2 = add.Tensor(LAYER/add, LAYER.mlp.down_proj) : f32[B, T, 32]
    model.norm = qc.rms_norm(LAYER/add.2, model.norm.weight: f32[32], 1e-06) : f32[B, T, 32]
    lm_head = linear(model.norm, model.embed_tokens.weight: f32[50, 32]) : f32[B, T, 50]
    return lm_head
""")
    .strip()
    .replace("LAYER", "model.layers.0")
)


def test_the_text_of_a_qwen3_is_this() -> None:
    assert str(qwen(1)) == GOLDEN


def test_two_captures_and_copies_have_one_text() -> None:
    text = str(qwen(1))
    assert str(capture(model(1))) == text
    assert str(qwen(1).copy()) == text


def test_the_dtype_of_the_model_shows_in_types_and_not_in_ops() -> None:
    wide, narrow = str(qwen(1)), str(qwen(1).to(torch.bfloat16))
    changed = [line for line in diff(wide, narrow).splitlines() if line.startswith("+") and "rotary_emb/cos" in line]
    assert changed == [], "what is computed in fp32 stays so"
    assert narrow.replace("bf16[", "f32[") == wide
    assert str(qwen(1).to(torch.bfloat16).to(torch.float32)) == wide


def test_constants_defaults_and_several_outputs_are_shown() -> None:
    graph = capture_module(nn.Linear(2, 2), torch.ones(1, 2))
    last = graph.module.graph.output_node()
    graph.add_input("training", False, default=False)
    node = graph.insert("aten.slice.Tensor", graph.sites()[0].node, 1, 0, 2**63 - 1, name="all", before=last)
    node = graph.insert(
        "aten.full_like", node, float("-inf"), name="low", before=last, dtype=torch.float16, device=torch.device("cpu")
    )
    graph.set_outputs([graph.sites()[0].node, node])
    graph.verify()
    assert (
        str(graph)
        == dedent("""
        input: f32[1, 2]
        training: bool = False
        linear = linear(input, weight: f32[2, 2], bias: f32[2]) : f32[1, 2]
        all = slice.Tensor(linear, 1, 0, end) : f32[1, 2]
        low = full_like(all, -inf, dtype=f16) : f16[1, 2]
        return linear, low
    """).strip()
    )


def test_a_diff_shows_what_changed_and_nothing_where_nothing_did() -> None:
    graph = capture_module(nn.Linear(2, 2), torch.ones(1, 2))
    before = str(graph)
    assert diff(before, str(graph)) == ""
    graph.set_outputs(
        [graph.insert("aten.relu", graph.sites()[0].node, name="relu", before=graph.module.graph.output_node())]
    )
    assert (
        diff(before, str(graph), ("a", "b"))
        == dedent("""
        --- a
        +++ b
        @@ -2,2 +2,3 @@
         linear = linear(input, weight: f32[2, 2], bias: f32[2]) : f32[1, 2]
        -return linear
        +relu = relu(linear) : f32[1, 2]
        +return relu
    """).strip()
    )
