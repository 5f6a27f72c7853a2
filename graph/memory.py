"""Memory beside a decoder: gated cross-attention to a set of token states, as ops.

    y = x + f(gate) * Wo attend(Wq norm(x), Wk memory, Wv memory)

with f the sigmoid or tanh of one number. A memory is a set: no position is known of its tokens but what their encoder
wrote into them, and nothing of it is masked but padding. Flamingo (arXiv:2204.14198) gates its layers in this way.

Inputs of a decoder that reads a memory; all may be left out, and then it computes what it did without:

memory         float [B, M, d]   the states of M tokens
memory_value   float [B, M, d]   what is read at those tokens, where that is another state than the one looked for
memory_mask    int [B, M]        0 is padding, n > 0 a token of document n; without it all are of one document

A row of which all is padding, and a memory of no tokens, add exactly nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from graph.ops import op, repeat_heads

HIDDEN = -1e9
"""What is added to the score of a padding token; finite, so that a row of padding alone has a softmax too."""

LEAST_PRIOR = 1e-6
"""What a token that was weighed with 0 before can still get."""


@op
def memory_tokens(memory: Tensor | None, batch: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The memory in the dtype of the decoder; without one, none for each of ``batch`` rows.

    memory: [B, M, width] or None  ->  [B, M, width], M = 0 where there is none
    """
    if memory is None:
        return torch.zeros(batch, 0, width, dtype=dtype, device=device)
    return memory.to(dtype)


@op
def memory_values(memory_value: Tensor | None, memory: Tensor) -> Tensor:
    """What is read at the tokens of ``memory``: the memory itself where nothing else is given. Both are [B, M, d]."""
    return memory if memory_value is None else memory_value.to(memory.dtype)


@op
def memory_seen(memory_mask: Tensor | None, memory: Tensor) -> Tensor:
    """Which tokens of ``memory`` [B, M, d] there are: bool [B, M], all of them without a mask."""
    if memory_mask is None:
        return torch.ones(memory.shape[:2], dtype=torch.bool, device=memory.device)
    return memory_mask.bool()


@op
def prepared(computed: Tensor, given: Tensor | None) -> Tensor:
    """``given`` where the caller has worked it out before, in the dtype of ``computed``; otherwise ``computed``."""
    return computed if given is None else given.to(computed.dtype)


@op
def memory_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    dropout: float = 0.0,
    training: bool = False,
    prior: Tensor | None = None,
) -> Tensor:
    """Attention to a memory; each of its heads serves ``heads / kv_heads`` query heads. The softmax is in fp32.

    q: [B, heads, T, d]    k, v: [B, kv_heads, M, d]    seen: bool [B, M]  ->  [B, T, heads, d], 0 where M = 0

    prior: fp32 [B, T or 1, M], by which tokens are weighed before they are looked at, or None: all alike
    """
    if k.shape[2] == 0:
        return torch.zeros_like(q).transpose(1, 2)
    groups, bias = q.shape[1] // k.shape[1], _bias(seen, q.dtype, prior)
    y = torch.nn.functional.scaled_dot_product_attention(
        q, repeat_heads(k, groups), repeat_heads(v, groups), attn_mask=bias, dropout_p=dropout if training else 0.0
    )
    return y.transpose(1, 2)


def memory_weights(q: Tensor, k: Tensor, seen: Tensor, prior: Tensor | None = None) -> Tensor:
    """What ``memory_attention`` weighs values with, spelled out.

    q: [B, heads, T, d]    k: [B, kv_heads, M, d]    seen: bool [B, M]    prior: fp32 [B, T or 1, M] or None
    ->  fp32 [B, heads, T, M], sums of 1
    """
    k = repeat_heads(k, q.shape[1] // k.shape[1])
    scores = torch.matmul(q, k.transpose(2, 3)).float() / math.sqrt(q.shape[-1])
    return torch.softmax(scores + _bias(seen, torch.float32, prior), dim=-1)


def _bias(seen: Tensor, dtype: torch.dtype, prior: Tensor | None) -> Tensor:
    """[B, 1, T or 1, M]: 0, or what is known before, where a token is seen; else far below, but not at infinity."""
    low = max(HIDDEN, torch.finfo(dtype).min)
    hidden = ~seen[:, None, None, :]
    if prior is None:
        return torch.zeros(hidden.shape, dtype=dtype, device=seen.device).masked_fill(hidden, low)
    return torch.log(prior + LEAST_PRIOR).to(dtype)[:, None].masked_fill(hidden, low)


@op
def add_gated(x: Tensor, update: Tensor, gate: Tensor, seen: Tensor, function: str = "sigmoid") -> Tensor:
    """``x + f(gate) * update`` in rows that have a memory, and exactly ``x`` in the others.

    x, update: [B, T, d]    gate: fp32 [1]    seen: bool [B, M]  ->  like x

    The function, ``sigmoid`` or ``tanh``, is computed in the dtype of the gate, and cast then.
    """
    opened = (torch.tanh(gate) if function == "tanh" else torch.sigmoid(gate)).to(x.dtype)
    has_memory = seen.any(dim=1).to(x.dtype)[:, None, None]
    return x + (opened * has_memory) * update.to(x.dtype)
