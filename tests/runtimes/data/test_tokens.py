from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graph import QcError
from runtimes.data import Document
from runtimes.data.tokens import Tokens, tokenized
from tests.runtimes.data.byte_tokenizer import byte_tokenizer

END, START = 257, 258
CHAT = ({"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"})


def made(*documents: Document, cache: Path, tokenizer: Any = None) -> Tokens:
    return tokenized(documents, [d.digest() for d in documents], tokenizer or byte_tokenizer(), cache)


def learned(tokens: Tokens, tokenizer: Any) -> str:
    assert tokens.trained is not None
    return str(tokenizer.decode(tokens.ids[tokens.trained]))


def test_every_document_ends_with_the_end_of_sequence_once(tmp_path: Path) -> None:
    tokens = made(Document("ab"), Document("c<|end|>"), cache=tmp_path)
    assert tokens.ids[[2, 4]].tolist() == [END, END]
    assert tokens.starts.tolist() == [0, 3, 5]
    assert tokens.trained is None
    assert tokens.ids.dtype == np.uint16


def test_a_tokenizer_that_begins_sequences_begins_documents_too(tmp_path: Path) -> None:
    tokens = made(Document("ab"), cache=tmp_path, tokenizer=byte_tokenizer(bos="<|start|>"))
    assert [tokens.ids[0], len(tokens.ids)] == [START, 4]


def test_of_a_prompt_and_its_response_the_response_and_its_end_are_learned(tmp_path: Path) -> None:
    tokens = made(Document("4", prompt="2+2="), cache=tmp_path)
    assert learned(tokens, byte_tokenizer()) == "4<|end|>"
    assert byte_tokenizer().decode(tokens.ids) == "2+2=4<|end|>"


def test_of_a_chat_what_the_template_writes_behind_the_end_is_not_learned(tmp_path: Path) -> None:
    tokens = made(Document("", messages=CHAT + CHAT), cache=tmp_path)
    assert learned(tokens, byte_tokenizer()) == "b<|end|>b<|end|>"
    assert byte_tokenizer().decode(tokens.ids).endswith("assistant\nb<|end|>\n")


def test_a_template_that_ends_nothing_gets_an_end_to_learn(tmp_path: Path) -> None:
    endless = byte_tokenizer(chat="{% for m in messages %}{{ m.role[0] }}: {{ m.content }}\n{% endfor %}"
                             "{% if add_generation_prompt %}a: {% endif %}")  # fmt: skip
    tokens = made(Document("", messages=CHAT), cache=tmp_path, tokenizer=endless)
    assert learned(tokens, endless) == "b\n<|end|>"


def test_tokens_are_mapped_into_memory_and_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = made(Document("ab"), cache=tmp_path)
    assert isinstance(first.ids, np.memmap)
    monkeypatch.setattr("runtimes.data.tokens._write", lambda *_: pytest.fail("made again"))
    assert made(Document("ab"), cache=tmp_path).ids.tolist() == first.ids.tolist()


def test_another_text_template_or_end_is_another_entry_of_the_cache(tmp_path: Path) -> None:
    keys = {
        made(Document("ab"), cache=tmp_path).key,
        made(Document("abc"), cache=tmp_path).key,
        made(Document("ab"), cache=tmp_path, tokenizer=byte_tokenizer(chat=None)).key,
        made(Document("ab"), cache=tmp_path, tokenizer=byte_tokenizer(eos="<|pad|>")).key,
        made(Document("ab"), cache=tmp_path, tokenizer=byte_tokenizer(bos="<|start|>")).key,
    }
    assert len(keys) == 5


def test_a_cache_that_was_cut_short_is_made_again(tmp_path: Path) -> None:
    whole = made(Document("abcdef"), cache=tmp_path).ids.tolist()
    (file,) = tmp_path.glob("*/ids.bin")
    file.write_bytes(file.read_bytes()[:-2])
    assert made(Document("abcdef"), cache=tmp_path).ids.tolist() == whole


def test_a_full_disk_is_an_error_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(QcError) as caught:
        made(Document("ab"), cache=tmp_path)
    assert str(caught.value) == (
        f"the disk is full: the tokens of the data did not fit into {tmp_path}\n"
        "  fix    free some space and run it again; it goes on from the last checkpoint"
    )
    assert list(tmp_path.iterdir()) == []


def test_without_a_tokenizer_there_is_nothing_to_read_with(tmp_path: Path) -> None:
    with pytest.raises(QcError) as caught:
        tokenized([], [], None, tmp_path)
    assert str(caught.value) == (
        "there is no tokenizer to read text with\n  fix    put tokenizer.json beside the model's config.json"
    )


def test_without_an_end_of_sequence_token_the_model_could_not_learn_to_stop(tmp_path: Path) -> None:
    with pytest.raises(QcError) as caught:
        made(Document("ab"), cache=tmp_path, tokenizer=byte_tokenizer(eos=None))
    assert str(caught.value) == (
        "the tokenizer has no end-of-sequence token, so the model cannot learn to stop\n"
        "  fix    set eos_token in tokenizer_config.json"
    )
