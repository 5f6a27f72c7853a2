"""Tiny models that read a memory, and chunks for them."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from graph import Graph, Selector
from graph.encoder import as_encoder
from passes.add_lora import AddLora
from passes.attach_memory import AttachMemory
from passes.insert_gca import InsertGca
from passes.runner import apply, link
from tests.graph.tiny import qwen

WIDTH, VOCABULARY = 32, 50
EVERYWHERE = InsertGca(layers=(0, 1))


@cache
def _decoder() -> Graph:
    graph = qwen()
    apply(EVERYWHERE, graph)
    return graph


def decoder() -> Graph:
    """A decoder of two blocks that reads a memory behind both."""
    return _decoder().copy()


@cache
def _joint() -> Graph:
    encoder = as_encoder(qwen())
    apply(AddLora(rank=2, select=Selector(role="attn.*")), encoder)
    return link(AttachMemory(), {"encoder": encoder, "decoder": decoder()})[0]


def joint() -> Graph:
    """That decoder, and an encoder with LoRA which makes its memory."""
    return _joint().copy()


def tokens(rows: int = 3, length: int = 7, seed: int = 1) -> Tensor:
    """int64 [rows, length]"""
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def memory(rows: int = 3, length: int = 5, seed: int = 2) -> Tensor:
    """fp32 [rows, length, width]"""
    return torch.randn(rows, length, WIDTH, generator=torch.Generator().manual_seed(seed))


def chunks() -> tuple[Tensor, Tensor]:
    """Ids and mask [3, 2, 6]: a row with padding in its first chunk, one without any text, one with one chunk."""
    ids = tokens(6, 6, seed=3).reshape(3, 2, 6)
    mask = torch.ones_like(ids)
    mask[0, 0, 4:] = 0
    mask[1] = 0
    mask[2, 1] = 0
    return ids, mask
