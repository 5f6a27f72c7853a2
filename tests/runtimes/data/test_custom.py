"""Text of one's own: in the recipe, in a folder laid out as WikiText is, as chats; and what calibrate reads of it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from graph import QcError
from qc.reading import text_reader
from recipes.load import load
from runtimes.data import Corpus
from runtimes.settings import Data, JsonLines, Texts, Wikitext
from tests.runtimes.data.byte_tokenizer import byte_tokenizer

TRAIN = "\n = First = \n\n One . \n\n = = Part = = \n\n Still one . \n\n = Second = \n\n Two . \n"
VALID = " = Third = \n\n Three . \n"


def said(data: Data, root: Path, split: Any) -> list[str]:
    from runtimes.data.sources import documents

    wanted = Corpus(data, root).split(split)
    return [document.text for document in documents(data, root) if document.digest() in wanted]


def read(data: Data, root: Path, tokens: int, length: int = 8, batch: int = 2) -> list[str]:
    """The rows that a pass gets, as text, documents that follow each other in one row among them."""
    recipe: Any = SimpleNamespace(file=root / "recipe.yaml", seed=0)
    tokenizer = byte_tokenizer()
    found = []
    for given in text_reader(recipe, root / "cache", lambda: tokenizer)(data, tokens, length, batch):
        for ids, mask in zip(given["input_ids"], given["attention_mask"], strict=True):
            found.append(tokenizer.decode(ids[mask > 0]))
    return found


def test_texts_in_the_recipe_are_all_read_and_none_is_held_out(tmp_path: Path) -> None:
    data = Texts(texts=tuple(f"text {n}" for n in range(40)))
    assert said(data, tmp_path, "train") == list(data.texts)
    assert said(data, tmp_path, "heldout") == []
    assert "".join(read(data, tmp_path, 40 * 7, length=7)).count("<|end|>") > 20


@pytest.mark.parametrize("names", [("wiki.train.tokens", "wiki.valid.tokens"), ("train.txt", "valid.txt")])
def test_of_wikitext_each_article_is_a_document_and_valid_is_held_out(tmp_path: Path, names: tuple[str, str]) -> None:
    for name, text in zip(names, (TRAIN, VALID), strict=True):
        (tmp_path / name).write_text(text)
    (tmp_path / "README.md").write_text("not read")
    data = Wikitext(wikitext=".")
    first, second = said(data, tmp_path, "train")
    assert first.strip().startswith("= First =") and "= = Part = =" in first and first.strip().endswith("Still one .")
    assert second.strip() == "= Second = \n\n Two ."
    assert said(data, tmp_path, "heldout") == [VALID]


def test_a_folder_of_parquet_files_is_read_without_a_network(tmp_path: Path, monkeypatch: Any) -> None:
    import datasets

    from runtimes.settings import HubDataset

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    (tmp_path / "wikitext").mkdir()
    rows = datasets.Dataset.from_dict({"text": ["", " = A = \n", " words \n"]})
    rows.to_parquet(tmp_path / "wikitext" / "train-00000-of-00001.parquet")
    assert said(HubDataset(hf="wikitext"), tmp_path, "all") == [" = A = \n", " words \n"]


def test_chats_are_read_through_the_template_several_in_a_row(tmp_path: Path) -> None:
    chats = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": str(n)}] for n in range(6)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    rows = read(JsonLines(jsonl="chat.jsonl"), tmp_path, tokens=100, length=64)
    assert all(row.startswith("<|start|>user\n") for row in rows)
    assert max(row.count("<|start|>assistant\n") for row in rows) > 1


def test_exactly_as_much_is_read_as_is_asked_for(tmp_path: Path) -> None:
    rows = read(Texts(texts=("a" * 500,)), tmp_path, tokens=60, length=8, batch=3)
    assert [len(row) for row in rows] == [8] * 8


def refused(folder: Path, data: str) -> str:
    (folder / "recipe.yaml").write_text(f"model: seedling\npasses:\n  - calibrate:\n      data: {data}\n")
    with pytest.raises(QcError) as caught:
        load(str(folder / "recipe.yaml"))
    return str(caught.value).replace(str(folder), "FOLDER")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (
            "{texts: []}",
            "calibrate: texts is empty\n  recipe FOLDER/recipe.yaml:4:21\n"
            "  fix    write texts: [A TEXT, ANOTHER], or name files with text:",
        ),
        (
            "{texts: [fine, ' ']}",
            "calibrate: number 2 of texts is blank\n  recipe FOLDER/recipe.yaml:4:21\n"
            "  fix    write something there, or take it out",
        ),
        (
            "{wikitext: nowhere}",
            "calibrate.data.wikitext: there is no folder 'nowhere'\n  recipe FOLDER/recipe.yaml:4:24\n"
            "  fix    write a path relative to the recipe",
        ),
        (
            "{wikitext: a.txt}",
            "calibrate.data.wikitext: 'a.txt' is a file\n  recipe FOLDER/recipe.yaml:4:24\n"
            "  fix    name the folder that it is in",
        ),
        (
            "{text: texts}",
            "calibrate.data.text: 'texts' is a folder\n  recipe FOLDER/recipe.yaml:4:20\n"
            "  fix    name its files: texts/**/*.txt",
        ),
        (
            "{jsonl: missing.jsonl}",
            "calibrate.data.jsonl: no file fits 'missing.jsonl'\n  recipe FOLDER/recipe.yaml:4:21\n"
            "  fix    write a path relative to the recipe",
        ),
    ],
)
def test_what_cannot_be_read_is_told_with_its_line(tmp_path: Path, data: str, text: str) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "texts").mkdir()
    assert refused(tmp_path, data) == text


@pytest.mark.parametrize(
    ("files", "text"),
    [
        (
            {"notes.txt": "x"},
            "wikitext: FOLDER has no wiki.train.tokens\n"
            "  fix    name a folder with wiki.train.tokens, wiki.train.raw or train.txt, or write {text: GLOB}",
        ),
        (
            {"wiki.train.raw": "x", "wiki.train.tokens": "y"},
            "wikitext: FOLDER has wiki.train.raw and wiki.train.tokens, both for train\n"
            "  fix    leave one of them in the folder",
        ),
        (
            {"wiki.train.raw": "\n\n"},
            "the data has no documents besides those held out\n"
            "  fix    give more, or other, data; an empty text is no document",
        ),
    ],
)
def test_a_folder_that_is_no_wikitext_is_told(tmp_path: Path, files: dict[str, str], text: str) -> None:
    (tmp_path / "folder").mkdir()
    for name, content in files.items():
        (tmp_path / "folder" / name).write_text(content)
    with pytest.raises(QcError) as caught:
        read(Wikitext(wikitext="folder"), tmp_path, 8)
    assert str(caught.value).replace(str(tmp_path / "folder"), "FOLDER") == text


def test_text_that_is_too_short_is_told_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(QcError) as caught:
        read(Texts(texts=("twelve bytes",)), tmp_path, tokens=64)
    assert str(caught.value) == (
        "tokens is 64, and the text has no more than 13 to read in rows of 8\n"
        "  fix    give more text, or set tokens to 13"
    )
