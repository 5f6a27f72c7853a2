from __future__ import annotations

from pathlib import Path

import pytest

from graph import QcError
from runtimes import stdlib_text
from runtimes.data import Corpus, Document
from runtimes.settings import PythonStdlib, TextFiles
from tests.runtimes.data.byte_tokenizer import byte_tokenizer


def texts(folder: Path, *contents: str) -> TextFiles:
    for number, content in enumerate(contents):
        (folder / f"{number:03}.txt").write_text(content)
    return TextFiles(text=str(folder / "*.txt"))


def test_training_and_held_out_text_share_no_document_even_if_a_file_is_there_twice(tmp_path: Path) -> None:
    corpus = Corpus(texts(tmp_path, *(f"text {n // 2}" for n in range(200))))
    train, held_out = corpus.split("train"), corpus.split("heldout")
    assert not train.keys() & held_out.keys()
    assert len(train) + len(held_out) == len(corpus.split("all")) == 100
    assert 1 <= len(held_out) <= 15


def test_of_two_documents_one_is_held_out_and_of_one_none(tmp_path: Path) -> None:
    assert len(Corpus(texts(tmp_path, "a", "b")).held_out) == 1
    assert len(Corpus(TextFiles(text=str(tmp_path / "000.txt"))).held_out) == 0


def test_what_is_held_out_does_not_depend_on_where_files_lie(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    contents = [f"text {n}" for n in range(50)]
    assert Corpus(texts(first, *contents)).held_out == Corpus(texts(second, *reversed(contents))).held_out


def test_of_the_standard_library_its_own_held_out_files_are_held_out() -> None:
    corpus = Corpus(PythonStdlib())
    held_out = {Document(stdlib_text.read_text(p)).digest() for p in stdlib_text.stdlib_files("heldout")}
    assert corpus.split("heldout").keys() == held_out
    assert not corpus.split("train").keys() & held_out


def test_documents_can_be_left_out(tmp_path: Path) -> None:
    corpus = Corpus(texts(tmp_path, "first", "second"))
    kept = corpus.rows(
        "all", tokenizer=byte_tokenizer(), length=8, cache=tmp_path / "c", without=[Document("first").digest()]
    )
    assert byte_tokenizer().decode(kept.tokens.ids) == "second<|end|>"


def test_only_as_many_documents_are_tokenized_as_will_be_read(tmp_path: Path) -> None:
    corpus = Corpus(texts(tmp_path, *(f"{n:03}" + "x" * 97 for n in range(100))))
    some = [
        corpus.rows(
            "train", tokenizer=byte_tokenizer(), length=16, cache=tmp_path / "c", seed=seed, enough=50
        ).tokens.ids
        for seed in (0, 0, 1)
    ]
    assert len(some[0]) == 4 * 101  # 50 tokens at 8 characters each
    assert some[0].tolist() == some[1].tolist() != some[2].tolist()


def test_data_without_documents_is_an_error(tmp_path: Path) -> None:
    corpus = Corpus(texts(tmp_path, "", ""))
    for split, said in (("all", ""), ("train", " besides those held out"), ("heldout", " to hold out")):
        with pytest.raises(QcError) as caught:
            corpus.rows(split, tokenizer=byte_tokenizer(), length=8, cache=tmp_path)  # type: ignore[arg-type]
        assert str(caught.value) == (
            f"the data has no documents{said}\n  fix    give more, or other, data; an empty text is no document"
        )


def test_answers_that_never_fit_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "much too long a question", "response": "no"}\n')
    from runtimes.settings import JsonLines

    corpus = Corpus(JsonLines(jsonl="a.jsonl"), tmp_path)
    with pytest.raises(QcError) as caught:
        corpus.rows("all", tokenizer=byte_tokenizer(), length=8, cache=tmp_path)
    assert str(caught.value) == (
        "no document has anything to learn within 8 tokens\n"
        "  fix    raise length, so that answers fit behind their prompts"
    )
