"""Where text can come from. The fields are the keys of a recipe.

Nothing but the standard library is imported here, so that reading a recipe does not load torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

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


Data: TypeAlias = PythonStdlib | TextFiles | JsonLines | HubDataset
