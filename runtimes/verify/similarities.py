"""Does an export find the same sentences alike as its graph? For encoders that say how their embeddings are pooled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from runtimes.verify.findings import Finding
from runtimes.verify.sentences import PAIRS

LEAST = 0.999
"""Spearman's correlation of the similarities of all pairs with those of the graph, in the modes fp32 and fp16."""


def sentence_rows(tokenizer: Any, longest: int) -> list[list[int]]:
    """The tokens of the first sentences of all pairs, then of the second ones, none longer than that."""
    texts = [pair[0] for pair in PAIRS] + [pair[1] for pair in PAIRS]
    return [list(tokenizer(text)["input_ids"])[:longest] for text in texts]


def similarities(hidden: Callable[[Sequence[int]], Tensor], pool: Callable[[Tensor], Tensor], rows: Any) -> Tensor:
    """Cosine similarity of each pair, [pairs]; ``hidden`` gives [tokens, C] of a row, ``pool`` makes [C] of it."""
    found = torch.stack([pool(hidden(row)).double() for row in rows])
    first, second = found.chunk(2)
    return torch.cosine_similarity(first, second, dim=-1)


def spearman(a: Tensor, b: Tensor) -> float:
    """The correlation of the ranks of two lists of numbers; equal numbers share the mean of their ranks."""
    ranks = torch.stack([_ranks(a), _ranks(b)])
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Tensor) -> Tensor:
    below = (values[None] < values[:, None]).double().sum(1)
    equal = (values[None] == values[:, None]).double().sum(1)
    return below + (equal - 1) / 2


def ranked(wanted: Tensor, found: dict[str, Tensor], numbers: dict[str, float]) -> Finding:
    """What the modes make of the ranking; that of the mode ``ane`` is told and decides nothing."""
    for mode, theirs in found.items():
        numbers[f"{mode}/spearman"] = spearman(wanted, theirs)
    told = ", ".join(f"{numbers[f'{mode}/spearman']:.5f} in {mode}" for mode in found)
    passed = all(numbers[f"{mode}/spearman"] >= LEAST for mode in found if mode != "ane")
    return Finding("similarities", passed, f"{len(PAIRS)} pairs of sentences, Spearman {told}, of {LEAST:g}")
