"""What packages are asked when they are verified: rows of tokens cut in the ways that an app cuts them, and prompts."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from runtimes.coreml.inputs import MEMORY_MASK
from runtimes.coreml.meta import Meta
from runtimes.mil import MODES

PROMPTS = (
    "def main(",
    "import os\nimport sys\n\n",
    "class Stack:\n    def push(self, value):\n",
    "for index in range(",
    'if __name__ == "__main__":\n',
    "The quick brown fox",
    '    """Return the number of',
    "def read(path):\n    with open(path) as file:\n        for line in file:\n            " * 4,
)
_SMALL = 100 * 2**20
"""Bytes of packages up to which 64 tokens behind each prompt take seconds."""


@dataclass(frozen=True)
class Row:
    """Tokens, and how they are read."""

    ids: list[int]
    pieces: list[int]
    """Tokens that are read in one go, one piece after the other; what a piece of 1 reads is decoded."""

    modes: tuple[str, ...] = MODES
    seen: int = 0
    """The first position whose result is looked at."""

    memory: bool = False
    """Whether it is read beside ``memory_probe``."""


def decoder_rows(meta: Meta) -> list[Row]:
    """A prompt of a block and a part of one, then single tokens; a short one; two turns; and the end of the context.

    With a window, the first row is longer than it, so that something is hidden.
    """
    size, context = meta.prefill or 16, meta.context
    window = max((mask.window or 0 for mask in meta.masks), default=0)
    first = min(max(size + size // 3, min(window + 8, 4 * size)), max(1, context - 12))
    cuts = [[first, *[1] * 12], [3, 1, 1, 1], [size // 4 + 1, 1, 1, size // 2 + 1, 1]]
    rows = []
    for number, pieces in enumerate(cuts):
        kept = _fitting(pieces, context)
        rows.append(Row(_tokens(meta, sum(kept), number), kept, memory=bool(meta.memory) and number != 1))
    last = _fitting([context - 4, 1, 1, 1, 1], context)
    rows.append(Row(_tokens(meta, sum(last), len(rows)), last, ("fp32",), max(0, context - 5)))
    return rows


def memory_probe(meta: Meta) -> dict[str, torch.Tensor]:
    """Keys and values of a memory that is not full; nothing for a model that reads none."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, (_, heads, tokens, size) in meta.memory.items():
        if name != MEMORY_MASK:
            found[name] = torch.randn(1, heads, tokens - tokens // 4, size, generator=generator)
    return found


def _fitting(pieces: list[int], context: int) -> list[int]:
    found: list[int] = []
    for piece in pieces:
        left = context - sum(found)
        if left > 0 and piece > 0:
            found.append(min(piece, left))
    return found


def encoder_rows(meta: Meta, padding: Collection[int] = ()) -> list[Row]:
    """For every length a text that fills it, and one that does not; without the tokens that stand for padding."""
    rows = list[Row]()
    for number, length in enumerate(sorted(meta.parts[0].functions.values())):
        for i, count in enumerate((length, max(1, length - length // 3))):
            rows.append(Row(_tokens(meta, count, 2 * number + i, padding), [count]))
    return rows


def _tokens(meta: Meta, count: int, seed: int, padding: Collection[int] = ()) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    real = torch.tensor([token for token in range(meta.vocabulary) if token not in padding])
    found: list[int] = real[torch.randint(0, len(real), (count,), generator=generator)].tolist()
    return found


def greedy_tokens(meta: Meta) -> int:
    """Tokens to generate behind each prompt: 64, of large models 16, and never more than half of the context."""
    total = sum(path.stat().st_size for part in meta.parts for path in (meta.folder / part.file).rglob("*.bin"))
    return max(1, min(64 if total <= _SMALL else 16, meta.context // 2))


def greedy_prompts(meta: Meta, tokenizer: Any) -> list[list[int]]:
    """The tokens of ``PROMPTS``, cut to what the context leaves; without a tokenizer, random ones."""
    room = meta.context - greedy_tokens(meta)
    if tokenizer is not None:
        found = [list(tokenizer(text)["input_ids"]) for text in PROMPTS]
    else:
        found = [_tokens(meta, 3 + 11 * i, 100 + i) for i in range(len(PROMPTS))]
    return [ids[:room] for ids in found if ids]
