"""From chunks of documents to a memory: what a joint graph does around its encoder, as ops.

memory_ids         int [B, C, S]   C chunks of S tokens for each row
memory_attention   int [B, C, S]   0 is padding; without it nothing is

Every chunk is a row of one batch of the encoder. Of what it gives, padding is dropped, the rest of a row's chunks is
joined in order, and padded with zeros on the right to the longest memory of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from graph.ops import op


@op
def chunk_ids(memory_ids: Tensor | None, device: torch.device) -> Tensor:
    """[B, C, S] -> [B * C, S]; one chunk of one token where there are none, for a batch of nothing has no shape."""
    if _absent(memory_ids):
        return torch.zeros(1, 1, dtype=torch.long, device=device)
    assert memory_ids is not None
    return memory_ids.flatten(0, 1)


@op
def chunk_mask(memory_attention: Tensor | None, ids: Tensor) -> Tensor:
    """The attention mask of the chunks ``ids`` [B * C, S]. A chunk of padding alone keeps its first token.

    Attention to nothing at all has no value; what comes of that token is dropped again by ``join_chunks``.
    """
    if _absent(memory_attention):
        return torch.ones_like(ids)
    assert memory_attention is not None
    mask = memory_attention.flatten(0, 1).to(ids.dtype)
    first = torch.cat((torch.ones_like(mask[:, :1]), torch.zeros_like(mask[:, 1:])), dim=1)
    return torch.where(mask.any(1, keepdim=True), mask, first)


@op
def join_chunks(
    states: Tensor, memory_ids: Tensor | None, memory_attention: Tensor | None, batch: int, most: int | None = None
) -> Tensor:
    """The states of each row's tokens, one chunk behind the other, without padding between them.

    states: [B * C, S, d]    memory_ids, memory_attention: int [B, C, S] or None  ->  [B, M, d], zeros at padding

    M is the number of tokens of the longest row, and at least 1; ``most`` cuts what is longer. Where values cannot be
    seen, M is as large as it may become, ``C * S``. Without chunks it is 0.
    """
    if _absent(memory_ids):
        return states.new_zeros(batch, 0, states.shape[2])
    flat = states.reshape(batch, -1, states.shape[2])
    if memory_attention is None:
        return flat if most is None else flat[:, :most]
    order, kept = _order(memory_attention, most)
    taken = flat.gather(1, order[:, :, None].expand(-1, -1, flat.shape[2]))
    return taken.masked_fill(~kept[:, :, None], 0)


@op
def joined_mask(
    memory_ids: Tensor | None, memory_attention: Tensor | None, ids: Tensor, batch: int, most: int | None = None
) -> Tensor:
    """The mask [B, M] of what ``join_chunks`` returns: the number of the chunk, from 1 on, and 0 at padding.

    ids: the chunks, [B * C, S]
    """
    if _absent(memory_ids):
        return ids.new_zeros(batch, 0)
    assert memory_ids is not None
    chunks, size = memory_ids.shape[1:]
    if memory_attention is None:
        numbers = torch.arange(1, chunks + 1, device=ids.device).repeat_interleave(size)
        whole = numbers.to(ids.dtype)[None].expand(batch, -1).contiguous()
        return whole if most is None else whole[:, :most]
    order, kept = _order(memory_attention, most)
    return ((order // size + 1) * kept).to(ids.dtype)


def _absent(chunks: Tensor | None) -> bool:
    return chunks is None or chunks.numel() == 0


def _order(memory_attention: Tensor, most: int | None) -> tuple[Tensor, Tensor]:
    """Where the m-th token of each row lies among its chunks, and whether there is one: both [B, M]."""
    real = memory_attention.flatten(1).bool()
    counts = real.sum(1)
    longest = real.shape[1] if _unreadable(real) else max(int(counts.max()), 1)
    length = longest if most is None else min(longest, most)
    order = torch.argsort(~real, dim=1, stable=True)[:, :length]
    return order, torch.arange(length, device=real.device)[None] < counts[:, None]


def _unreadable(value: Tensor) -> bool:
    return value.is_meta or isinstance(value, FakeTensor)
