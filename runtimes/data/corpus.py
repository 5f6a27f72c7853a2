"""A source of data, read once to know its documents: which are for training, which for evaluation, and their rows."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from graph.errors import QcError
from runtimes.data.batches import Rows
from runtimes.data.sources import Document, documents, held_out
from runtimes.data.tokens import end_of, tokenized
from runtimes.settings import Data

Split = Literal["train", "heldout", "all"]

_CHARACTERS_A_TOKEN = 8
"""More than tokenizers reach on average, so that a sample chosen by its characters has tokens enough."""


class Corpus:
    """The documents of ``data``, copies counted once; relative paths start at ``root``."""

    def __init__(self, data: Data, root: Path = Path()):
        self.data, self.root = data, root
        self.sizes = {document.digest(): document.size() for document in documents(data, root)}
        self.held_out = held_out(data, self.sizes, root) & self.sizes.keys()

    def digest(self) -> str:
        """A hash of all documents and of which are held out."""
        return hashlib.sha256(b"".join([*sorted(self.sizes), *sorted(self.held_out)])).hexdigest()

    def split(self, split: Split) -> dict[bytes, int]:
        """Digests and sizes of a split: ``train`` and ``heldout`` never share a document, ``all`` is both."""
        return {
            d: size for d, size in self.sizes.items() if split == "all" or (d in self.held_out) == (split == "heldout")
        }

    def rows(
        self,
        split: Split,
        *,
        tokenizer: Any,
        length: int,
        cache: Path,
        packing: bool = True,
        seed: int = 0,
        without: Collection[bytes] = (),
        enough: int | None = None,
    ) -> Rows:
        """The rows of a split; documents whose digest is among ``without`` are left out. Tokens are kept in ``cache``.

        If no more than ``enough`` tokens will be read, documents chosen by the seed are tokenized instead of all.
        """
        found = {digest: size for digest, size in self.split(split).items() if digest not in without}
        if not found:
            rest = {"heldout": " to hold out", "train": " besides those held out", "all": ""}[split]
            raise QcError(
                f"the data has no documents{rest}", fix="give more, or other, data; an empty text is no document"
            )
        chosen = _sample(found, enough * _CHARACTERS_A_TOKEN, seed) if enough else found
        tokens = tokenized(self._documents(chosen), chosen, tokenizer, cache)
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end_of(tokenizer)
        rows = Rows(tokens, length=length, packing=packing, seed=seed, padding=int(padding))
        if len(rows) == 0:
            raise QcError(
                f"no document has anything to learn within {length} tokens",
                fix="raise length, so that answers fit behind their prompts",
            )
        return rows

    def _documents(self, wanted: Collection[bytes]) -> Iterator[Document]:
        left = set(wanted)
        for document in documents(self.data, self.root):
            if (digest := document.digest()) in left:
                left.remove(digest)
                yield document


def _sample(sizes: Mapping[bytes, int], characters: int, seed: int) -> dict[bytes, int]:
    """Documents chosen by the seed, in their old order, that have ``characters`` characters together."""
    salt, chosen, total = seed.to_bytes(8, "little"), set(), 0
    for digest in sorted(sizes, key=lambda d: hashlib.sha256(salt + d).digest()):
        if total >= characters:
            break
        chosen.add(digest)
        total += sizes[digest]
    return {digest: size for digest, size in sizes.items() if digest in chosen}
