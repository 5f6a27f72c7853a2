"""Staged cross-attention: which documents of a memory matter, and then which of their tokens.

    w[b, t, d] = mean over heads of softmax_d(q[t] . k[last token of d] / sqrt(size))        coarse
    attention to token m of document d, with log(w[b, t, d] + 1e-6) added to its score          fine

A document is summed up by the state of its last token, which has read the others. Documents are numbered from 1 on in
``memory_mask``, and the tokens of one stand together. Weights belong to a position of the text: were they averaged over
all of it, a token would be read by what comes behind it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from graph.core import Graph
from graph.gca import Inserted, Memory, insert_of_memory
from graph.memory import memory_weights
from graph.ops import op
from graph.sites import node_name, set_tag, tag


@op
def memory_documents(memory_mask: Tensor | None, memory: Tensor) -> Tensor:
    """The number of the document of each token of ``memory`` [B, M, d]: int [B, M], 0 at padding, 1 without a mask."""
    if memory_mask is None:
        return torch.ones(memory.shape[:2], dtype=torch.long, device=memory.device)
    return memory_mask.long()


@op
def last_tokens(documents: Tensor) -> Tensor:
    """Which tokens are the last of their document: int [B, M]  ->  bool [B, M]."""
    behind = torch.cat((documents[:, 1:], documents.new_zeros(documents.shape[0], 1)[:, : documents.shape[1]]), dim=1)
    return (documents > 0) & (documents != behind)


@op
def document_weights(q: Tensor, k: Tensor, last: Tensor, per_position: bool = True) -> Tensor:
    """How much each document is looked at, on average over heads, where its last token stands; 0 elsewhere.

    q: [B, heads, T, d]    k: [B, kv_heads, M, d]    last: bool [B, M]  ->  fp32 [B, T, M], or [B, 1, M] on average over
    the positions of a text that is read as a whole
    """
    if k.shape[2] == 0:
        return torch.zeros(q.shape[0], q.shape[2] if per_position else 1, 0, device=q.device)
    weights = memory_weights(q, k, last).mean(1) * last[:, None]
    return weights if per_position else weights.mean(1, keepdim=True)


@op
def token_weights(weights: Tensor, last: Tensor) -> Tensor:
    """Give every token the weight of its document: that of the next last token.

    weights: fp32 [B, T or 1, M]    last: bool [B, M]  ->  like weights
    """
    count = last.shape[1]
    if count == 0:
        return weights
    at = torch.arange(count, device=last.device).expand(last.shape).masked_fill(~last, count)
    following = at.flip(1).cummin(1).values.flip(1).clamp(max=count - 1)
    return weights.gather(2, following[:, None].expand(-1, weights.shape[1], -1))


def insert_last_tokens(graph: Graph, memory: Memory) -> fx.Node:
    """Which tokens of the memory are the last of their document."""
    tokens, _, seen = memory
    read = (seen.args[0], tokens)
    documents = insert_of_memory(graph, "qc.memory_documents", *read, name="documents", before=seen.next)
    return insert_of_memory(graph, "qc.last_tokens", documents, name="last", before=documents.next)


def weigh_documents(graph: Graph, coarse: Inserted, last: fx.Node, per_position: bool) -> fx.Node:
    """Behind a coarse block: the weights that its attention gives to documents, spread over their tokens."""
    q, k = coarse.attention.args[:2]
    path = node_name(coarse.added).removesuffix(".add")

    def insert(op: str, *args: Any, name: str, after: fx.Node) -> fx.Node:
        node = graph.insert(op, *args, name=f"{path}.{name}", before=after.next, role="gca.weights")
        set_tag(node, **{key: tag(coarse.added, key) for key in ("block", "stack", "path")})
        return node

    weights = insert("qc.document_weights", q, k, last, per_position, name="weights", after=coarse.added)
    return insert("qc.token_weights", weights, last, name="spread", after=weights)
