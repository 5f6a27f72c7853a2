"""What an ONNX model is asked when it is verified: tokens and masks, and how they are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graph import Graph
from graph.encoder import longest_text
from graph.ops import op_name
from graph.probe import vocabulary
from runtimes.verify.probes import PROMPTS

SHAPES: tuple[tuple[int, int, int, tuple[int, ...]], ...] = (
    (2, 24, 0, ()), (3, 17, -5, (9, 1, 7)), (3, 17, 5, (8, 1, 1, 7)), (1, 1, 0, ()), (4, 41, -40, ()),
)  # fmt: skip
"""Rows, tokens, the padding of the last row (before 0: on the right), and the pieces that it is read in with a past."""

REACH = 1100
"""The longest row that is read to see the end of a sliding window."""


@dataclass(frozen=True)
class Probe:
    """Tokens and mask [B, T], and how they are read."""

    ids: Tensor
    mask: Tensor
    pieces: tuple[int, ...]
    text: bool = False


def probes_of(graph: Graph, kv: bool, tokenizer: Any) -> list[Probe]:
    """Random tokens of several batches and lengths, whole, padded on either side, of several documents; and texts.

    With a past, some of them are read in pieces. A row goes beyond the widest sliding window; none goes beyond the
    positions that the model has, and documents are put only to a model that tells them apart.
    """
    generator, longest = torch.Generator().manual_seed(0), _longest(graph)
    found = []
    for rows, asked, padded, pieces in (*SHAPES, *_beyond(_window(graph), longest)):
        length = min(asked, longest)
        ids = torch.randint(0, vocabulary(graph), (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[-1, slice(max(padded, 1 - length), None) if padded < 0 else slice(min(padded, length - 1))] = 0
        found.append(Probe(ids, mask, pieces if kv and sum(pieces) == length else (length,)))
    if _tells_documents(graph):
        ids = torch.randint(0, vocabulary(graph), (2, min(23, longest)), generator=generator)
        documents = torch.ones_like(ids)
        documents[:, 9:], documents[0, 15:] = 2, 3
        found.append(Probe(ids, documents, (ids.shape[1],)))
    for prompt in PROMPTS if tokenizer is not None else ():
        ids = torch.tensor([list(tokenizer(prompt)["input_ids"])[:longest]])
        found.append(Probe(ids, torch.ones_like(ids), (ids.shape[1],), text=True))
    return found


def _longest(graph: Graph) -> int:
    """The most tokens that the model has positions for."""
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    said = (longest_text(graph), *(graph.config.get(name) for name in names))
    return min((size for size in said if isinstance(size, int)), default=REACH)


def _beyond(window: int, longest: int) -> Iterator[tuple[int, int, int, tuple[int, ...]]]:
    """A row that a window ends within, where the others do not reach so far."""
    length = window + 9
    if max(length for _, length, _, _ in SHAPES) < length <= min(REACH, longest):
        yield 1, length, 0, (window + 3, 1, 5)


def _window(graph: Graph) -> int:
    """The tokens that the widest sliding window reaches over."""
    return max(
        (size for s in graph.sites("qc.attention_mask") for size in s.node.args[2:] if isinstance(size, int)), default=0
    )


def _tells_documents(graph: Graph) -> bool:
    """Whether nothing but attention reads the mask: counts of tokens make nothing of numbers above 1."""
    inputs = [n for n in graph.module.graph.nodes if n.op == "placeholder" and n.target == "attention_mask"]
    return all(op_name(user.target) == "qc.attention_mask" for node in inputs for user in node.users)
