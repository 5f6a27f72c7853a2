"""How much a model looks up: whole answers, with the memory, without it, and with that of another question.

exact_match              share of questions whose answer is said and nothing else
prefix_match             share whose answer begins what is said
substring_match          share whose answer is in what is said, with a word's border on both sides
exact_match/no_memory    exact_match where there is nothing to look up
exact_match/shuffled     exact_match where each question of a batch has the chunks of the next one
memory_contribution      exact_match less that without memory
accuracy/CATEGORY        exact_match over the questions of a category

What is said is cut at the end-of-sequence token, then at the first new line, and stripped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from graph import Graph, QcError
from runtimes.data.batches import IGNORED
from runtimes.retrieval.example import Asked
from runtimes.retrieval.questions import AskedBatch, Questions, fits


class Reader(Protocol):
    """A graph that may read a memory."""

    @property
    def inputs(self) -> Collection[str]:
        """The names of what it reads."""

    @property
    def device(self) -> torch.device:
        """Where it is."""

    def __call__(self, **inputs: Tensor) -> Any:
        """Logits, [B, T, vocabulary]."""


Speak: TypeAlias = Callable[[Reader, AskedBatch, Questions], list[str]]

ABLATIONS: dict[str, Callable[[AskedBatch], AskedBatch]] = {
    "no_memory": AskedBatch.without_memory,
    "shuffled": AskedBatch.with_memory_of_the_next_row,
}

_LONGER = 8
"""Tokens that are generated beyond the longest answer, to see whether the model ends."""


@dataclass(frozen=True)
class Reply:
    """What a model said to a question."""

    asked: Asked
    said: str

    @property
    def exact(self) -> bool:
        """The answer and nothing else."""
        return self.said == self.asked.answer

    @property
    def prefix(self) -> bool:
        """The answer first: 12 for 1 too."""
        return self.said.startswith(self.asked.answer)

    @property
    def boundary(self) -> bool:
        """The answer somewhere, as a word."""
        return re.search(rf"(?<!\w){re.escape(self.asked.answer)}(?!\w)", self.said) is not None


def recall(graph: Reader, questions: Questions, *, batches: int, batch: int, greedy: bool = False) -> dict[str, float]:
    """The scores of ``graph`` on the first questions, ``batches`` times ``batch`` of them.

    Without ``greedy`` each token is the likeliest behind the right ones before it. For whole answers that comes to the
    same as generating them, in one pass; the other two scores then are those of a model that is put right.
    """
    if batch < 2:
        raise QcError("memory is shuffled within a batch, and a batch has one question", fix="set batch to 2 or more")
    if "memory_ids" not in graph.inputs:
        raise QcError(
            "the model reads no memory, so it can look nothing up",
            fix="join an encoder and a decoder with attach-memory",
        )
    if isinstance(graph, Graph):
        fits(graph, questions.data)
    speak = generated if greedy else forced
    asked = [questions.batch(range(at * batch, (at + 1) * batch)) for at in range(batches)]
    replies = list(_replies(graph, questions, asked, speak))
    found = scores(replies)
    for name, change in ABLATIONS.items():
        without = list(_replies(graph, questions, [change(one) for one in asked], speak))
        found[f"exact_match/{name}"] = _share([reply.exact for reply in without])
    found["memory_contribution"] = found["exact_match"] - found["exact_match/no_memory"]
    return found


def scores(replies: Sequence[Reply]) -> dict[str, float]:
    """The shares of replies that are right, and those of each category."""
    found = {
        "questions": float(len(replies)),
        "exact_match": _share([reply.exact for reply in replies]),
        "prefix_match": _share([reply.prefix for reply in replies]),
        "substring_match": _share([reply.boundary for reply in replies]),
    }
    for category in sorted({reply.asked.category for reply in replies}):
        of_it = [reply.exact for reply in replies if reply.asked.category == category]
        found[f"accuracy/{category}"] = _share(of_it)
    return found


def heard(text: str) -> str:
    """What counts of a text that ended: its first line, without spaces around it."""
    return text.split("\n")[0].strip()


def forced(graph: Reader, batch: AskedBatch, questions: Questions) -> list[str]:
    """The likeliest token at every place of the answers, all in one pass."""
    at = batch.labels != IGNORED
    likeliest = iter(_run(graph, batch.inputs())[at.to(graph.device)].argmax(-1).tolist())
    lengths = [int(((batch.attention_mask == number) & at)[row].sum()) for row, number in _places(batch)]
    return [_text([next(likeliest) for _ in range(length)], questions) for length in lengths]


def generated(graph: Reader, batch: AskedBatch, questions: Questions) -> list[str]:
    """What follows the prompts, the likeliest token each time, until all have ended or are longer than any answer."""
    prompts, answers = _prompts(batch)
    ends, eos = torch.tensor([len(prompt) for prompt in prompts]), int(questions.tokenizer.eos_token_id)
    rows, more = torch.arange(len(prompts)), max(answers) + _LONGER
    ids = torch.full((len(prompts), int(ends.max()) + more), eos)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    source = torch.tensor([row for row, _ in _places(batch)])
    memory = {name: value[source] for name, value in batch.inputs().items() if name.startswith("memory")}
    said: list[list[int]] = [[] for _ in prompts]
    for step in range(more):
        used = int(ends.max()) + step
        mask = (torch.arange(used)[None] < (ends + step)[:, None]).long()
        logits = _run(graph, {"input_ids": ids[:, :used], "attention_mask": mask, **memory})
        new = logits[rows.to(graph.device), (ends + step - 1).to(graph.device)].argmax(-1).cpu()
        ids[rows, ends + step] = new
        for spoken, token in zip(said, new.tolist(), strict=True):
            spoken.append(token)
        if all(eos in spoken for spoken in said):
            break
    return [_text(row, questions) for row in said]


def _places(batch: AskedBatch) -> list[tuple[int, int]]:
    """The row of every question, and its number in the row's mask."""
    return [(row, number) for row, one in enumerate(batch.examples) for number in range(1, len(one.asked) + 1)]


def _prompts(batch: AskedBatch) -> tuple[list[Tensor], list[int]]:
    """The tokens before every answer, and how many it has."""
    prompts, answers = [], []
    for row, number in _places(batch):
        own = batch.attention_mask[row] == number
        labelled = batch.labels[row][own] != IGNORED
        answers.append(int(labelled.sum()))
        prompts.append(batch.input_ids[row][own][: int(labelled.int().argmax()) + 1])
    return prompts, answers


def _replies(graph: Reader, questions: Questions, batches: Sequence[AskedBatch], speak: Speak) -> Iterator[Reply]:
    for batch in batches:
        asked = (one for example in batch.examples for one in example.asked)
        for one, text in zip(asked, speak(graph, batch, questions), strict=True):
            yield Reply(one, heard(text))


def _text(tokens: list[int], questions: Questions) -> str:
    eos = questions.tokenizer.eos_token_id
    ended = tokens[: tokens.index(eos)] if eos in tokens else tokens
    return str(questions.tokenizer.decode(ended))


def _run(graph: Reader, inputs: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        found: Tensor = graph(**{name: value.to(graph.device) for name, value in inputs.items()})
        return found


def _share(held: Sequence[bool]) -> float:
    return sum(held) / len(held)
