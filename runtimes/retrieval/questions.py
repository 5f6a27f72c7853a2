"""Questions as rows of tokens, each with its chunks: what a training reads instead of packed text.

Example ``n`` of a split follows from the seed and ``n`` alone; nothing is stored, so that there is no end to them and
no order to remember. The number of chunks rises with ``n``: with the place in the training, whatever the mixture. The
questions about the same chunks are documents of one row: they are numbered in its mask, and none sees another.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from graph import Graph
from graph.encoder import longest_text
from graph.errors import QcError
from runtimes.data import Batch
from runtimes.data.batches import IGNORED
from runtimes.retrieval.dice import Dice
from runtimes.retrieval.docstrings import docstrings
from runtimes.retrieval.example import Asked, Example, Split
from runtimes.retrieval.lookup import lookup
from runtimes.retrieval.needle import needle
from runtimes.settings import Retrieval

Task: TypeAlias = Callable[[Retrieval, Split, int, Dice], Example]

TASKS: Mapping[str, Task] = {"lookup": lookup, "needle": needle, "docstrings": docstrings}


@dataclass(frozen=True)
class AskedBatch(Batch):
    """A batch with the questions it was made of."""

    examples: tuple[Example, ...] = field(kw_only=True)


class Questions:
    """The questions of a split. ``memory_tokenizer`` is the encoder's; without it, that of the decoder."""

    def __init__(
        self, data: Retrieval, split: Split, *, tokenizer: Any, memory_tokenizer: Any, length: int, seed: int = 0
    ):
        for one, whose in ((tokenizer, "decoder"), (memory_tokenizer, "encoder")):
            _needs(
                one is not None, f"there is no tokenizer of the {whose}", "put tokenizer.json beside its config.json"
            )
        _needs(
            tokenizer.eos_token_id is not None,
            "the tokenizer has no end-of-sequence token, so the model cannot learn to stop",
            "set eos_token in tokenizer_config.json",
        )
        self.data, self.split, self.length, self.seed = data, split, length, seed
        self.tokenizer, self.memory_tokenizer = tokenizer, memory_tokenizer
        said = json.dumps([asdict(data), split, seed, length, *(_digest(t) for t in (tokenizer, memory_tokenizer))])
        self.key = hashlib.sha256(said.encode()).hexdigest()

    def __len__(self) -> int:
        """As many as can be counted."""
        return sys.maxsize

    def example(self, number: int) -> Example:
        """Example ``number``."""
        dice = Dice(self.seed, self.split, number)
        return TASKS[self._task(dice)](self.data, self.split, self.chunks(number), dice)

    def chunks(self, number: int) -> int:
        """The chunks of example ``number``; those held out have all of them."""
        data = self.data
        risen = number - data.first_questions
        if self.split == "heldout" or risen >= data.curriculum:
            return data.chunks
        first = min(data.first_chunks, data.chunks)
        return first if risen < 0 else first + risen * (data.chunks - first) // data.curriculum

    def shuffled(self, first: int, count: int) -> AskedBatch:
        """``count`` examples from number ``first`` on; they come shuffled."""
        return self.batch(range(first, first + count))

    def batch(self, rows: Sequence[int]) -> AskedBatch:
        """The examples of these numbers, all as long as the longest of them."""
        examples = tuple(self.example(number) for number in rows)
        pieces = self._pieces(examples)
        longest = max(sum(len(prompt) + len(answer) - 1 for prompt, answer in row) for row in pieces)
        _needs(
            longest <= self.length,
            f"what is asked of some chunks has {longest} tokens with its answers, and a row {self.length}",
            f"raise length to {longest} at least, or lower asks",
        )
        ids, mask, labels = _rows(pieces, longest, _padding(self.tokenizer))
        memory_ids, memory_mask = self._memory(examples)
        return AskedBatch(ids, mask, labels, memory_ids, memory_mask, examples=examples)

    def prompt(self, asked: Asked) -> str:
        """What stands before the answer."""
        return self.data.ask.format(question=asked.question, key=asked.key)

    def _pieces(self, examples: Sequence[Example]) -> list[list[tuple[list[int], list[int]]]]:
        """The tokens of every prompt and answer, by example."""
        asked = [one for example in examples for one in example.asked]
        prompts = self.tokenizer([self.prompt(one) for one in asked])["input_ids"]
        answers = self.tokenizer([" " + one.answer for one in asked], add_special_tokens=False)["input_ids"]
        pairs = iter(zip(prompts, ([*answer, self.tokenizer.eos_token_id] for answer in answers), strict=True))
        return [[next(pairs) for _ in example.asked] for example in examples]

    def _memory(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        texts = [chunk for one in examples for chunk in one.chunks]
        encoded = self.memory_tokenizer(texts)["input_ids"]
        longest = max(map(len, encoded))
        _needs(
            longest <= self.data.chunk_length,
            f"a chunk has {longest} tokens of the encoder, and chunk_length is {self.data.chunk_length}",
            "raise chunk_length, or ask for fewer entries and sentences in a chunk",
        )
        most = max(len(one.chunks) for one in examples)
        ids = np.full((len(examples), most, longest), _padding(self.memory_tokenizer), np.int64)
        mask = np.zeros_like(ids)
        left = iter(encoded)
        for r, example in enumerate(examples):
            for c in range(len(example.chunks)):
                tokens = next(left)
                ids[r, c, : len(tokens)], mask[r, c, : len(tokens)] = tokens, 1
        return torch.from_numpy(ids), torch.from_numpy(mask)

    def _task(self, dice: Dice) -> str:
        if isinstance(self.data.retrieval, str):
            return self.data.retrieval
        total = sum(self.data.retrieval.values())
        left = dice.below(1 << 53) / (1 << 53) * total
        for name, weight in self.data.retrieval.items():
            left -= weight
            if left < 0:
                return name
        return name


def fits(graph: Graph, data: Retrieval) -> None:
    """Raises QcError where chunks may be longer than what the encoder of a joint graph has positions for."""
    longest = longest_text(graph)
    _needs(
        longest is None or data.chunk_length <= longest,
        f"chunk_length is {data.chunk_length}, and the encoder has positions for {longest} tokens",
        f"set chunk_length to {longest}; a chunk that is longer is an error then",
    )


def _rows(pieces: Sequence[Sequence[tuple[list[int], list[int]]]], width: int, padding: int) -> tuple[Tensor, ...]:
    """Ids, mask and labels of prompts with their answers; only answers, and the ends behind them, are labels.

    Nothing follows an end, so it is a label and never read: of answers of one token a third of all that would be.
    """
    ids = np.full((len(pieces), width), padding, np.int64)
    mask, labels = np.zeros_like(ids), np.full_like(ids, IGNORED)
    for r, row in enumerate(pieces):
        begin = 0
        for number, (prompt, answer) in enumerate(row, 1):
            end = begin + len(prompt) + len(answer) - 1
            ids[r, begin:end], mask[r, begin:end] = [*prompt, *answer[:-1]], number
            labels[r, begin + len(prompt) - 1 : end] = answer
            begin = end
    return torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(labels)


def _padding(tokenizer: Any) -> int:
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0)


def _digest(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{type(tokenizer).__name__}{tokenizer.eos_token_id}{model}".encode()).hexdigest()


def _needs(holds: bool, what: str, fix: str) -> None:
    if not holds:
        raise QcError(what, fix=fix)
