from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from graph import QcError
from runtimes.data import Document
from runtimes.data.sources import documents
from runtimes.settings import Data, HubDataset, JsonLines, PythonStdlib, TextFiles


def read(data: Data, root: Path) -> list[Document]:
    return list(documents(data, root))


def lines(path: Path, *rows: Any) -> JsonLines:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return JsonLines(jsonl=path.name)


def refused(data: Data, root: Path) -> str:
    with pytest.raises(QcError) as caught:
        read(data, root)
    return str(caught.value).replace(str(root), "ROOT")


def test_each_text_file_is_a_document_in_sorted_order_and_empty_ones_are_none(tmp_path: Path) -> None:
    for name, text in {"b.txt": "two", "a.txt": "one", "c.txt": "", "sub/d.txt": "four"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert [d.text for d in read(TextFiles(text="**/*.txt"), tmp_path)] == ["one", "two", "four"]
    assert [d.text for d in read(TextFiles(text=("b.txt", "?.txt")), tmp_path)] == ["one", "two"]


def test_json_lines_hold_texts_answers_or_chats_and_say_so_by_their_columns(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    assert read(lines(tmp_path / "a.jsonl", {"text": "plain", "prompt": "ignored"}), tmp_path) == [Document("plain")]
    assert read(lines(tmp_path / "a.jsonl", {"prompt": "2+2=", "response": "4"}), tmp_path) == [
        Document("4", prompt="2+2=")
    ]
    assert read(lines(tmp_path / "a.jsonl", {"messages": chat}), tmp_path) == [Document("", messages=tuple(chat))]


def test_columns_can_be_named(tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", {"q": "2+2=", "a": "4", "text": "not this"})
    assert read(JsonLines(jsonl="a.jsonl", prompt="q", response="a"), tmp_path) == [Document("4", prompt="2+2=")]
    assert read(JsonLines(jsonl="a.jsonl", text="q"), tmp_path) == [Document("2+2=")]


def test_a_line_that_is_not_json_is_shown_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n\n{"text": oops}\n')
    assert refused(JsonLines(jsonl="a.jsonl"), tmp_path) == (
        "ROOT/a.jsonl:3:10 is not JSON: Expecting value\n  fix    write one JSON object a line"
    )


def test_a_line_that_is_no_object_is_shown(tmp_path: Path) -> None:
    data = lines(tmp_path / "a.jsonl", [1, 2])
    assert refused(data, tmp_path) == "ROOT/a.jsonl:1 is not a JSON object\n  fix    write one JSON object a line"


def test_columns_that_are_not_there_are_shown_with_those_that_are(tmp_path: Path) -> None:
    data = lines(tmp_path / "a.jsonl", {"content": "x", "id": 1})
    assert refused(data, tmp_path) == (
        "ROOT/a.jsonl:1 has neither text, messages, nor prompt and response; its columns are content, id\n"
        "  fix    name the columns in the recipe: text:, messages:, or prompt: and response:"
    )
    assert refused(JsonLines(jsonl="a.jsonl", text="txt"), tmp_path) == (
        "ROOT/a.jsonl:1 has no column 'txt'; its columns are content, id\n  fix    name a column that every row has"
    )
    assert refused(JsonLines(jsonl="a.jsonl", prompt="id"), tmp_path) == (
        "the data names a column for prompt but none for response\n  fix    name the response column too"
    )


def test_a_value_of_the_wrong_type_is_shown(tmp_path: Path) -> None:
    data = lines(tmp_path / "a.jsonl", {"text": 3})
    assert refused(data, tmp_path) == (
        "ROOT/a.jsonl:1: column 'text' holds int, not text\n  fix    repair the row, or name another column"
    )
    data = lines(tmp_path / "a.jsonl", {"messages": ["hello"]})
    assert refused(data, tmp_path) == (
        'ROOT/a.jsonl:1: a message is not a map of role and content\n  fix    write {"role": …, "content": …}'
    )


def test_a_glob_without_files_is_an_error(tmp_path: Path) -> None:
    assert refused(TextFiles(text="no/*.txt"), tmp_path) == (
        "text: no/*.txt matches no file\n  fix    check the path; it starts at the recipe's folder"
    )


def test_a_file_that_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    assert refused(TextFiles(text="a.txt"), tmp_path) == (
        "ROOT/a.txt is not UTF-8 at byte 3\n  fix    convert it: iconv -t utf-8"
    )


@pytest.mark.parametrize("split", ["train", "train[:2]", "train[50%:]", "train[-2:]"])
def test_a_saved_data_set_and_a_folder_of_files_give_the_same_rows(tmp_path: Path, split: str) -> None:
    import datasets

    texts = ["one", "two", "three", "four"]
    lines(tmp_path / "train.jsonl", *({"text": t} for t in texts))
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": texts})}).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "files").mkdir()
    (tmp_path / "train.jsonl").rename(tmp_path / "files" / "train.jsonl")
    found = read(HubDataset(hf="files", split=split), tmp_path)
    assert found == read(HubDataset(hf="saved", split=split), tmp_path)
    wanted = {"train": texts, "train[:2]": texts[:2], "train[50%:]": texts[2:], "train[-2:]": texts[-2:]}
    assert [d.text for d in found] == wanted[split]


def test_a_data_set_that_is_not_here_is_an_error_without_a_network(tmp_path: Path) -> None:
    said = refused(HubDataset(hf="nobody/nothing"), tmp_path)
    assert said.startswith("cannot load the data set nobody/nothing: ")
    assert said.endswith(
        "fix    check the name, split and config; without a network, give a local folder or a data set in the cache"
    )


def test_the_standard_library_is_read_from_the_interpreter(tmp_path: Path) -> None:
    texts = {d.text for d in documents(PythonStdlib(), tmp_path)}
    assert Path(json.__file__).read_text() in texts
