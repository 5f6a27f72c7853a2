"""A question, the chunks beside it, and its answer; and which keys are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

from graph.errors import QcError
from runtimes.retrieval.dice import Dice

Split: TypeAlias = Literal["train", "heldout"]
T = TypeVar("T")

HELD_OUT_ONE_IN = 10
"""Keys of which one is held out: no question of the training has it, neither asked for nor beside."""

_TRIES = 4096
"""Draws after which something that has not come up counts as impossible."""


@dataclass(frozen=True)
class Asked:
    """One question. Exactly one of the chunks beside it answers it."""

    question: str
    """What is asked, as a sentence."""

    key: str
    """What it is asked of."""

    answer: str
    chunk: int
    """The number of the chunk that answers."""

    category: str
    """What the scores are also told apart by."""


@dataclass(frozen=True)
class Example:
    """Chunks, and what is asked of them."""

    chunks: tuple[str, ...]
    asked: tuple[Asked, ...]


def split_of(key: str) -> Split:
    """The split that a key belongs to, from what it says alone.

    >>> [key for key in ("string", "stack", "since", "table", "start") if split_of(key) == "heldout"]
    []
    """
    digest = hashlib.sha256(key.encode()).digest()
    return "heldout" if int.from_bytes(digest[:8], "little") % HELD_OUT_ONE_IN == 0 else "train"


def drawn(dice: Dice, draw: Callable[[Dice], T], good: Callable[[T], bool], what: str) -> T:
    """The first that is ``good`` of what ``draw`` gives; ``what`` says what runs out if none is."""
    for _ in range(_TRIES):
        if good(found := draw(dice)):
            return found
    raise QcError(
        f"there are not enough {what} for the chunks of a question",
        fix="ask for fewer chunks or entries, or for longer keys and values",
    )
