"""The sequences of a cache: rows of the data, in an order that the seed decides."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graph.errors import QcError
from runtimes.data import Batch, Corpus, Rows
from runtimes.distill.layout import Split
from runtimes.distill.thinking import Thinking
from runtimes.settings import Cache


@dataclass(frozen=True)
class Sequences:
    """The sequences of one split. Of chats rendered twice, with thoughts and without, they alternate."""

    rows: tuple[Rows, ...]
    count: int

    def batch(self, numbers: range) -> Batch:
        """The sequences of these numbers, which must be of one rendering if there are several."""
        kinds = len(self.rows)
        assert len({n % kinds for n in numbers}) == 1, "a batch of two renderings"
        return self.rows[numbers[0] % kinds].batch([n // kinds for n in numbers])

    def batches(self, numbers: range, size: int) -> Iterable[range]:
        """``numbers`` in batches of at most ``size``, each of one rendering."""
        for kind in range(len(self.rows)):
            first = numbers.start + (kind - numbers.start) % len(self.rows)
            own = range(first, numbers.stop, len(self.rows))
            yield from (own[at : at + size] for at in range(0, len(own), size))


@dataclass(frozen=True)
class Text:
    """What a cache is made of."""

    train: Sequences
    heldout: Sequences
    documents: str
    """The sha256 of all documents."""

    tokens: str
    """The sha256 of the tokens the sequences are cut from."""

    notes: tuple[str, ...]


def open_text(settings: Cache, *, tokenizer: Any, root: Path, cache: Path, seed: int) -> Text:
    """The sequences that ``settings`` ask for; fewer held-out ones, if the data has no more."""
    corpus = Corpus(settings.data, root)
    kinds = {"with": (True,), "without": (False,), "both": (True, False), None: (None,)}[settings.thinking]
    tokenizers = [tokenizer if kind is None else Thinking(tokenizer, enabled=kind) for kind in kinds]
    options = {"length": settings.length, "packing": settings.packing, "cache": cache, "seed": seed}
    train = [_rows(corpus, "train", -(-settings.sequences // len(kinds)), one, options) for one in tokenizers]
    found = _available(train)
    if found < settings.sequences:
        raise QcError(
            f"the data has {found} sequences of {settings.length} tokens, not {settings.sequences}",
            fix=f"set cache.sequences to at most {found}, or give more data",
        )
    heldout, notes = _held_out(corpus, settings, tokenizers, options)
    used = [*train, *heldout.rows]
    tokens = hashlib.sha256(json.dumps([rows.key for rows in used]).encode()).hexdigest()
    return Text(Sequences(tuple(train), settings.sequences), heldout, documents_digest(corpus), tokens, notes)


def _held_out(
    corpus: Corpus, settings: Cache, tokenizers: list[Any], options: dict[str, Any]
) -> tuple[Sequences, tuple[str, ...]]:
    if not settings.heldout:
        return Sequences((), 0), ()
    if not corpus.split("heldout"):
        return Sequences((), 0), ("nothing is held out: the data is a single document",)
    rows = [_rows(corpus, "heldout", -(-settings.heldout // len(tokenizers)), one, options) for one in tokenizers]
    count = min(settings.heldout, _available(rows))
    short = f"{count} held-out sequences, not {settings.heldout}: the data has no more"
    return Sequences(tuple(rows), count), (() if count == settings.heldout else (short,))


def _rows(corpus: Corpus, split: Split, wanted: int, tokenizer: Any, options: dict[str, Any]) -> Rows:
    """Rows of a split, of as few documents as will do."""
    rows = corpus.rows(split, tokenizer=tokenizer, enough=wanted * options["length"], **options)
    return rows if len(rows) >= wanted else corpus.rows(split, tokenizer=tokenizer, **options)


def _available(rows: list[Rows]) -> int:
    """How many sequences there are when the kinds of rows alternate."""
    return min(len(one) * len(rows) + nth for nth, one in enumerate(rows))


def documents_digest(corpus: Corpus) -> str:
    """The sha256 of what all documents say, in whatever order they come."""
    return hashlib.sha256(b"".join(sorted(corpus.sizes))).hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """The sha256 of what the numbers of tokens mean."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
