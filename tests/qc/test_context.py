"""Going on from a prompt with files to look things up in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from graph import QcError
from runtimes.context import with_context
from runtimes.generate import Generator
from runtimes.sampling import Sampling
from tests.graph.tiny import qwen
from tests.passes.memories import VOCABULARY, joint

TEXTS = ("a fox", "and a long text about nothing in particular")


class Letters:
    """A tokenizer of single letters."""

    eos_token_id, pad_token_id, chat_template = None, 0, None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % VOCABULARY for letter in text]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(chr(97 + int(i) % 26) for i in ids)

    @property
    def all_special_ids(self) -> list[int]:
        return []


def greedy(ids: list[int], count: int, **memory: torch.Tensor) -> list[int]:
    """What the whole joint graph goes on with, everything read again for each token."""
    found = list(ids)
    for _ in range(count):
        with torch.no_grad():
            found.append(int(joint()(input_ids=torch.tensor([found]), **memory)[0, -1].argmax()))
    return found[len(ids) :]


def said(texts: tuple[str, ...], count: int = 6) -> tuple[int, ...]:
    model = with_context(joint(), Letters(), texts, length=16)
    rows = Generator(model, Letters(), eos=[])([[3, 1, 4, 1, 5]], Sampling(max_tokens=count)).rows
    return rows[0].ids


def test_a_cached_decoder_says_what_the_joint_graph_says() -> None:
    pieces = [Letters()(text)["input_ids"] for text in TEXTS]
    chunks = [pieces[0], *(pieces[1][at : at + 16] for at in range(0, len(pieces[1]), 16))]
    ids, mask = torch.zeros(1, len(chunks), 16, dtype=torch.long), torch.zeros(1, len(chunks), 16, dtype=torch.long)
    for at, chunk in enumerate(chunks):
        ids[0, at, : len(chunk)], mask[0, at, : len(chunk)] = torch.tensor(chunk), 1
    assert list(said(TEXTS)) == greedy([3, 1, 4, 1, 5], 6, memory_ids=ids, memory_attention=mask)


def test_without_any_text_it_is_the_decoder() -> None:
    alone = Generator(qwen(), Letters(), eos=[])([[3, 1, 4, 1, 5]], Sampling(max_tokens=6)).rows[0].ids
    assert said(()) == alone
    assert said(TEXTS) != alone


def test_a_model_without_an_encoder_takes_no_context() -> None:
    with pytest.raises(QcError) as caught:
        with_context(qwen(), Letters(), TEXTS)
    assert str(caught.value) == (
        "this model has no encoder that could read a context\n"
        "  fix    take the context out, or give a model that attach-memory has made"
    )


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    from qc.speaking import _text

    with pytest.raises(QcError) as caught:
        _text(tmp_path / "none.txt")
    assert str(caught.value) == (
        f"cannot read {tmp_path}/none.txt: No such file or directory\n  fix    give text files to --context"
    )
