"""Texts that a model may look things up in while it goes on from a prompt: read once, before the first token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graph import Graph, QcError
from graph.encoder import longest_text
from graph.joint import is_joint
from graph.prepared import hoist, part, prepare
from runtimes.reading import GraphModel

CHUNK = 256
"""Tokens of a chunk, at most: a longer text is several."""


def with_context(graph: Graph, tokenizer: Any, texts: Sequence[str], *, length: int = CHUNK) -> GraphModel:
    """A joint graph, ready to generate with ``texts`` as its memory; with none, its decoder alone.

    ``tokenizer`` is the encoder's. Its keys and values are worked out here, so that the encoder runs once.
    """
    if not is_joint(graph):
        what, fix = "this model has no encoder that could read a context", "take the context out"
        raise QcError(what, fix=f"{fix}, or give a model that attach-memory has made")
    length = min(length, longest_text(graph) or length)
    twin = graph.materialize().copy()
    hoist(twin)
    memory = prepare(twin, _chunks(tokenizer, texts, length))
    return GraphModel(part(twin)[1], memory)


def _chunks(tokenizer: Any, texts: Sequence[str], length: int) -> dict[str, Tensor]:
    """Ids and mask [1, C, S] of all texts in order; without any token, no chunk."""
    pieces: list[list[int]] = []
    for text in texts:
        tokens = list(tokenizer(text, verbose=False)["input_ids"])
        pieces += [tokens[at : at + length] for at in range(0, len(tokens), length)]
    longest = max(map(len, pieces), default=0)
    ids = torch.zeros(1, len(pieces), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for at, piece in enumerate(pieces):
        ids[0, at, : len(piece)] = torch.tensor(piece)
        mask[0, at, : len(piece)] = 1
    return {"memory_ids": ids, "memory_attention": mask}
