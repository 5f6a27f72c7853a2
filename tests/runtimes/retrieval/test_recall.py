"""Scores: of models that look things up, that guess, and that know one answer by heart."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from graph.errors import QcError
from runtimes.retrieval import Asked, AskedBatch, Questions
from runtimes.retrieval.recall import Reply, heard, recall, scores
from runtimes.settings import Retrieval
from tests.runtimes.data.byte_tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
DATA = Retrieval(retrieval="lookup", ask="{key}:", forms=("{key} = {value}",), key=2, value=2, entries=2, asks=2)
LETTERS = 260
CPU = torch.device("cpu")


def questions(data: Retrieval = DATA) -> Questions:
    return Questions(data, "heldout", tokenizer=TOKENIZER, memory_tokenizer=TOKENIZER, length=256)


@dataclass
class Scripted:
    """A model whose next token is the next of what ``answer`` says to a prompt and its chunks."""

    answer: Callable[[str, str], str]
    inputs: tuple[str, ...] = ("input_ids", "attention_mask", "memory_ids", "memory_attention")
    device: torch.device = CPU
    calls: int = 0

    def __call__(self, **given: Tensor) -> Tensor:
        self.calls += 1
        ids, mask = given["input_ids"], given["attention_mask"]
        logits = torch.zeros(*ids.shape, LETTERS)
        for row in range(len(ids)):
            memory = (
                given["memory_ids"][row][given["memory_attention"][row] == 1] if "memory_ids" in given else ids[0, :0]
            )
            for number in range(1, int(mask[row].max()) + 1):
                (places,) = torch.nonzero(mask[row] == number, as_tuple=True)
                whole = TOKENIZER.decode(ids[row, places])
                prompt = whole[: whole.index(":") + 1]
                said = TOKENIZER(self.answer(prompt, TOKENIZER.decode(memory)) + "<|end|>")["input_ids"]
                first = len(TOKENIZER(prompt)["input_ids"]) - 1
                for place, token in zip(places[first:].tolist(), said, strict=False):
                    logits[row, place, token] = 1
        return logits


def looks_up(prompt: str, memory: str) -> str:
    found = re.search(rf"{prompt[:-1]} = (..)", memory)
    return f" {found[1]}" if found else " xx"


@pytest.mark.parametrize("greedy", [False, True])
def test_who_looks_up_is_right_with_the_memory_and_wrong_without_or_with_that_of_another(greedy: bool) -> None:
    model = Scripted(looks_up)
    assert recall(model, questions(), batches=2, batch=4, greedy=greedy) == {
        "questions": 16, "exact_match": 1, "prefix_match": 1, "substring_match": 1, "accuracy/lookup": 1,
        "exact_match/no_memory": 0, "exact_match/shuffled": 0, "memory_contribution": 1,
    }  # fmt: skip
    assert (model.calls == 2 * 3) is not greedy


def test_greedy_replies_go_on_until_they_end() -> None:
    found = recall(Scripted(lambda *given: looks_up(*given) + "xyz"), questions(), batches=1, batch=4, greedy=True)
    assert (found["exact_match"], found["prefix_match"], found["substring_match"]) == (0, 1, 0)


def test_who_says_what_stands_first_in_the_memory_gains_little_by_it() -> None:
    found = recall(Scripted(lambda _, memory: " " + memory[5:7]), questions(), batches=4, batch=4)
    assert 0 < found["exact_match"] < 0.5
    assert found["memory_contribution"] == found["exact_match"] - found["exact_match/no_memory"]


def test_accuracy_is_told_apart_by_category() -> None:
    asked = [Asked("", "", answer, 0, category) for answer, category in (("12", "a"), ("12", "a"), ("12", "b"))]
    found = scores([Reply(one, said) for one, said in zip(asked, ("12", "123", "the 12 of"), strict=True)])
    assert found == {
        "questions": 3, "exact_match": 1 / 3, "prefix_match": 2 / 3, "substring_match": 2 / 3,
        "accuracy/a": 0.5, "accuracy/b": 0,
    }  # fmt: skip


@pytest.mark.parametrize(("said", "exact", "prefix", "boundary"), [
    ("12", True, True, True),
    ("123", False, True, False),
    ("12.", False, True, True),
    ("it is 12", False, False, True),
    ("it is 312", False, False, False),
    ("", False, False, False),
])  # fmt: skip
def test_a_longer_number_is_no_answer(said: str, exact: bool, prefix: bool, boundary: bool) -> None:
    reply = Reply(Asked("", "", "12", 0, ""), said)
    assert (reply.exact, reply.prefix, reply.boundary) == (exact, prefix, boundary)


def test_only_the_first_line_counts() -> None:
    assert heard("  12 \n 13") == "12"
    assert heard("\n12") == ""


def test_memory_is_swapped_within_a_batch_so_that_nobody_keeps_their_own() -> None:
    seen: list[tuple[str, str]] = []

    def note(prompt: str, memory: str) -> str:
        seen.append((prompt, memory))
        return looks_up(prompt, memory)

    made = questions()
    recall(Scripted(note), made, batches=1, batch=4)
    batch: AskedBatch = made.batch(range(4))
    own = {f"{asked.key}:": "".join(one.chunks) for one in batch.examples for asked in one.asked}
    kinds = ["own" if own[prompt] == memory else "none" if not memory else "other" for prompt, memory in seen]
    assert kinds == ["own"] * 8 + ["none"] * 8 + ["other"] * 8


def test_errors_of_what_cannot_be_scored() -> None:
    with pytest.raises(QcError) as caught:
        recall(Scripted(looks_up), questions(), batches=1, batch=1)
    assert str(caught.value) == (
        "memory is shuffled within a batch, and a batch has one question\n  fix    set batch to 2 or more"
    )
    with pytest.raises(QcError) as caught:
        recall(Scripted(looks_up, inputs=("input_ids",)), questions(), batches=1, batch=2)
    assert str(caught.value) == (
        "the model reads no memory, so it can look nothing up\n"
        "  fix    join an encoder and a decoder with attach-memory"
    )
