"""Where text can come from. The fields are the keys of a recipe.

Nothing that loads torch is imported here, so that reading a recipe does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Literal, TypeAlias, get_args

from graph.errors import QcError, raise_all

Globs: TypeAlias = str | tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class PythonStdlib:
    """The source of Python's standard library, read from the running interpreter."""

    source: Literal["python-stdlib"] = "python-stdlib"
    """The name of a source that needs no address."""


@dataclass(frozen=True, kw_only=True)
class TextFiles:
    """Text files, each a document."""

    text: Globs
    """Globs over text files; ``**`` crosses folders."""


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Texts that stand in the recipe itself, each a document."""

    texts: tuple[str, ...]
    """The texts. None of them is held out."""

    def __post_init__(self) -> None:
        """Refuse a list in which there is nothing to read."""
        if not self.texts:
            raise QcError("texts is empty", fix="write texts: [A TEXT, ANOTHER], or name files with text:")
        blank = next((at for at, text in enumerate(self.texts, 1) if not text.strip()), None)
        if blank is not None:
            raise QcError(f"number {blank} of texts is blank", fix="write something there, or take it out")


@dataclass(frozen=True, kw_only=True)
class Wikitext:
    """A folder laid out as WikiText is: each article a document, those of valid and test held out."""

    wikitext: str
    """Folder with wiki.train.tokens (or .raw, or .txt), and those of valid and test if evaluation shall read them."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Where the text of a row is: one column, a pair of prompt and response, or a chat."""

    text: str | None = None
    """Column with plain text. If no column is named: ``text``, ``messages``, or ``prompt`` and ``response``."""

    prompt: str | None = None
    """Column with what is asked; not trained on."""

    response: str | None = None
    """Column with what is answered; goes with ``prompt`` and follows it as it is written, nothing between them."""

    messages: str | None = None
    """Column with a chat, a list of ``{role, content}``; written out by the model's chat template."""


@dataclass(frozen=True, kw_only=True)
class JsonLines(Columns):
    """Files with one JSON object a line."""

    jsonl: Globs
    """Globs over .jsonl files; ``**`` crosses folders."""


@dataclass(frozen=True, kw_only=True)
class HubDataset(Columns):
    """A dataset of the Hugging Face hub, or a local folder of one."""

    hf: str
    """``org/name`` on the hub, or a folder."""

    split: str = "train"
    """Split, slices allowed: ``train[:1%]``."""

    config: str | None = None
    """Configuration of the dataset, where it has several."""


RetrievalTask: TypeAlias = Literal["lookup", "needle", "docstrings"]
TASKS: tuple[RetrievalTask, ...] = get_args(RetrievalTask)


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Questions whose answers stand in chunks beside them, for a decoder that looks things up with an encoder."""

    retrieval: RetrievalTask | Mapping[str, float]
    """lookup (tables of made-up keys), needle (a fact among sentences) or docstrings (functions of the standard
    library); or several with their weights: ``{lookup: 3, needle: 1}``."""

    ask: str = "Question: {question}\nAnswer:"
    """What stands before the answer; {question} is the question, {key} what it asks for."""

    chunks: int = 4
    """Chunks beside a question, one of which answers it."""

    asks: int = 1
    """Questions about the same chunks; they stand in one row, and none sees another."""

    first_chunks: int = 1
    """Chunks beside the first question of a training; matters with ``first_questions`` or ``curriculum``."""

    first_questions: int = 0
    """Questions that have ``first_chunks``, before the number rises."""

    curriculum: int = 0
    """Questions behind those over which the chunks rise from ``first_chunks`` to ``chunks``; 0 has all at once."""

    entries: int = 3
    """Keys of a table, or functions, in a chunk."""

    filler: int = 2
    """Sentences in a chunk that say nothing, beside a table; around a needle."""

    hard: float = 0.2
    """Share of the rest that is easily mistaken for what is asked: keys that nearly are the one, statements of a kind,
    functions of the same module."""

    names: Literal["letters", "words"] = "letters"
    """What keys and values of a table are made of."""

    key: int = 4
    """Letters or words of a key of a table."""

    value: int = 6
    """Letters or words of a value of a table."""

    vocabulary: int | None = None
    """Words that values of a table are made of; without it, all there are."""

    forms: tuple[str, ...] = ("{key}: {value}", "{key} = {value}", "the value of {key} is {value}")
    """How a table writes a line."""

    chunk_length: int = 256
    """Tokens of the encoder that a chunk may have."""

    def __post_init__(self) -> None:
        """Refuse placeholders that nothing fills, and tables that cannot be read."""
        raise_all(list(self._mistakes()))

    def _mistakes(self) -> Iterator[QcError]:
        known = {"ask": ("question", "key"), "forms": ("key", "value")}
        for name, texts in (("ask", (self.ask,)), ("forms", self.forms)):
            for text in texts:
                strange = [word for word in _placeholders(text) if word not in known[name]]
                if strange:
                    what = f"{name} has {{{strange[0]}}}, which nothing fills"
                    yield QcError(
                        what, fix=f"write {{{known[name][0]}}} and {{{known[name][1]}}}, and {{{{ for a brace"
                    )
        if not set(_placeholders(self.ask)):
            yield QcError("ask names neither question nor key", fix="write {question} or {key} where it belongs")
        if any({"key", "value"} - set(_placeholders(form)) for form in self.forms):
            yield QcError("forms has a line without key and value", fix="write {key} and {value} in each")
        if not self.forms:
            yield QcError("forms is empty", fix="give the form of a line, or leave forms out")
        if not self.retrieval:
            yield QcError("retrieval names no task", fix=f"write {' or '.join(TASKS)}")
        tasks = {self.retrieval: 1.0} if isinstance(self.retrieval, str) else self.retrieval
        for task, weight in tasks.items():
            if not weight > 0:
                yield QcError(f"retrieval gives {task} a weight of {weight:g}", fix="give a weight above 0")
            if task not in TASKS:
                yield QcError(f"retrieval has no task {task!r}", fix=f"write {' or '.join(TASKS)}")


def _placeholders(text: str) -> list[str]:
    """The words in braces."""
    try:
        return [word for _, word, _, _ in Formatter().parse(text) if word is not None]
    except ValueError:  # a single brace
        return [text]


Data: TypeAlias = PythonStdlib | TextFiles | Texts | Wikitext | JsonLines | HubDataset | Retrieval
