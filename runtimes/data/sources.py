"""Where documents come from: the standard library, text files, JSON lines, data sets of the hub.

Documents are read one at a time and in a fixed order. Which are held out for evaluation follows from what they say,
not from where they lie, so that a copy of a held-out document is held out too.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from graph.errors import QcError
from runtimes import stdlib_text
from runtimes.data import wikitext
from runtimes.settings import Columns, Data, HubDataset, JsonLines, PythonStdlib, Retrieval, TextFiles, Texts, Wikitext

Split = Literal["train", "heldout", "all"]

HELD_OUT_ONE_IN = 20


@dataclass(frozen=True, slots=True)
class Document:
    """One text to learn from: plain, an answer to a prompt, or a chat."""

    text: str
    """Plain text, or the response."""

    prompt: str | None = None
    """What the text answers; not trained on."""

    messages: tuple[Mapping[str, Any], ...] | None = None
    """A chat instead of a text."""

    def digest(self) -> bytes:
        """The sha256 of its content."""
        said = self.text if self.prompt is None and self.messages is None else json.dumps(
            [self.text, self.prompt, self.messages], sort_keys=True, ensure_ascii=False
        )  # fmt: skip
        return hashlib.sha256(said.encode("utf-8", "surrogatepass")).digest()

    def size(self) -> int:
        """About how many characters it has."""
        return (
            len(self.text) + len(self.prompt or "") + sum(len(str(m.get("content", ""))) for m in self.messages or ())
        )

    def empty(self) -> bool:
        """Whether there is nothing to learn from it."""
        return not (self.text or self.messages)


def documents(data: Data, root: Path) -> Iterator[Document]:
    """Every document of ``data`` in a fixed order, empty ones left out; relative paths start at ``root``."""
    if isinstance(data, Retrieval):
        raise QcError(
            "questions with chunks beside them are no text to read from end to end",
            fix="give text: or another source of text here; retrieval: is for train and evaluate",
        )
    source = _rows(data, root) if isinstance(data, JsonLines | HubDataset) else _plain(data, root)
    return (document for document in source if not document.empty())


def held_out(data: Data, sizes: Mapping[bytes, int], root: Path) -> frozenset[bytes]:
    """The digests of the documents kept for evaluation: one in 20, and one at least if there are two.

    Of the standard library it is what its own split holds out: files that the shipped model never saw. Of WikiText it
    is valid and test, and of texts in the recipe none.
    """
    if isinstance(data, Texts):
        return frozenset()
    if isinstance(data, Wikitext):
        return frozenset(Document(text).digest() for text in _articles(data, root, wikitext.PARTS[1:]))
    if isinstance(data, PythonStdlib):
        return frozenset(Document(stdlib_text.read_text(path)).digest() for path in _stdlib("heldout"))
    chosen = frozenset(digest for digest in sizes if int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0)
    return chosen or frozenset([min(sizes)] if len(sizes) > 1 else [])


def _plain(data: PythonStdlib | TextFiles | Texts | Wikitext, root: Path) -> Iterator[Document]:
    return map(Document, _texts(data, root))


def _texts(data: PythonStdlib | TextFiles | Texts | Wikitext, root: Path) -> Iterable[str]:
    match data:
        case Texts():
            return data.texts
        case Wikitext():
            return _articles(data, root, wikitext.PARTS)
        case TextFiles():
            return map(_read_text, _files(data.text, root, "text"))
    return map(stdlib_text.read_text, sorted(_stdlib("train") + _stdlib("heldout")))


def _articles(data: Wikitext, root: Path, parts: Collection[str]) -> Iterator[str]:
    found = wikitext.files(root / Path(data.wikitext).expanduser())
    return (text for part in found if part in parts for text in wikitext.articles(_read_text(found[part])))


@cache
def _stdlib(split: Literal["train", "heldout"]) -> tuple[Path, ...]:
    return tuple(stdlib_text.stdlib_files(split))


def _rows(data: JsonLines | HubDataset, root: Path) -> Iterator[Document]:
    columns: Columns | None = None
    for place, row in _json_lines(data, root) if isinstance(data, JsonLines) else _hub_rows(data, root):
        columns = columns or _columns(data, row, place)
        yield _document(columns, row, place)


def _columns(data: Columns, row: Mapping[str, Any], place: str) -> Columns:
    """The columns that are named, or those that the first row shows."""
    if data.text or data.messages or (data.prompt and data.response):
        return data
    if data.prompt or data.response:
        missing = "response" if data.prompt else "prompt"
        raise QcError(
            f"the data names a column for {'prompt' if data.prompt else 'response'} but none for {missing}",
            fix=f"name the {missing} column too",
        )
    if "text" in row:
        return Columns(text="text")
    if "messages" in row:
        return Columns(messages="messages")
    if "prompt" in row and "response" in row:
        return Columns(prompt="prompt", response="response")
    raise QcError(
        f"{place} has neither text, messages, nor prompt and response; its columns are {', '.join(row)}",
        fix="name the columns in the recipe: text:, messages:, or prompt: and response:",
    )


def _document(columns: Columns, row: Mapping[str, Any], place: str) -> Document:
    if columns.messages:
        chat = _column(row, columns.messages, place, list)
        if not all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in chat):
            raise QcError(f"{place}: a message is not a map of role and content", fix='write {"role": …, "content": …}')
        return Document("", messages=tuple({k: v for k, v in m.items() if v is not None} for m in chat))
    if columns.prompt and columns.response:
        return Document(_column(row, columns.response, place, str), prompt=_column(row, columns.prompt, place, str))
    assert columns.text
    return Document(_column(row, columns.text, place, str))


def _column(row: Mapping[str, Any], name: str, place: str, kind: type) -> Any:
    if name not in row:
        raise QcError(
            f"{place} has no column {name!r}; its columns are {', '.join(row)}", fix="name a column that every row has"
        )
    if not isinstance(row[name], kind):
        wanted = "text" if kind is str else "a list of messages"
        raise QcError(
            f"{place}: column {name!r} holds {type(row[name]).__name__}, not {wanted}",
            fix="repair the row, or name another column",
        )
    return row[name]


def _json_lines(data: JsonLines, root: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for path in _files(data.jsonl, root, "jsonl"):
        for number, line in enumerate(_read_text(path).split("\n"), 1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise QcError(
                    f"{place}:{error.colno} is not JSON: {error.msg}", fix="write one JSON object a line"
                ) from None
            if not isinstance(row, dict):
                raise QcError(f"{place} is not a JSON object", fix="write one JSON object a line")
            yield place, row


def _files(globs: str | tuple[str, ...], root: Path, key: str) -> list[Path]:
    """The files of all globs in sorted order, each once; a glob that matches nothing is an error."""
    found: set[Path] = set()
    for pattern in (globs,) if isinstance(globs, str) else globs:
        paths = {
            Path(p) for p in glob.glob(str(root / Path(pattern).expanduser()), recursive=True) if Path(p).is_file()
        }
        if not paths:
            folder = (root / Path(pattern).expanduser()).is_dir()
            if folder:
                raise QcError(f"{key}: {pattern} is a folder", fix=f"name its files: {pattern.rstrip('/')}/**/*.txt")
            raise QcError(f"{key}: {pattern} matches no file", fix="check the path; it starts at the recipe's folder")
        found |= paths
    return sorted(found)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise QcError(f"{path} is not UTF-8 at byte {error.start}", fix="convert it: iconv -t utf-8") from None
    except OSError as error:
        raise QcError(f"cannot read {path}: {error.strerror}", fix="check the file and its permissions") from None


def _hub_rows(data: HubDataset, root: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, row in enumerate(_load_dataset(data, root)):
        yield f"row {number} of {data.hf}", row


def _load_dataset(data: HubDataset, root: Path) -> Any:
    import datasets
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    folder = root / Path(data.hf).expanduser()
    name, _, split = data.split.partition("[")
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            return _saved(folder if (folder / "state.json").is_file() else folder / name, split)
        return datasets.load_dataset(str(folder) if folder.exists() else data.hf, data.config, split=data.split)
    except (DatasetNotFoundError, DatasetGenerationError, ConnectionError, FileNotFoundError, ValueError) as error:
        first = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise QcError(
            f"cannot load the data set {data.hf}: {first}",
            fix="check the name, split and config; without a network, give a local folder or a data set in the cache",
        ) from None


def _saved(folder: Path, slice_: str) -> Any:
    """A data set that ``save_to_disk`` wrote; ``slice_`` is what follows the opening bracket of ``train[:10]``."""
    import datasets

    found = datasets.load_from_disk(str(folder))
    if not slice_:
        return found
    low, _, high = slice_.rstrip("]").partition(":")
    first, last = (_bound(text, len(found), default) for text, default in ((low, 0), (high, len(found))))
    return found.select(range(first, max(first, last)))


def _bound(text: str, rows: int, default: int) -> int:
    if not text:
        return default
    at = round(float(text[:-1]) / 100 * rows) if text.endswith("%") else int(text)
    return min(max(at + rows if at < 0 else at, 0), rows)
