"""The text that passes and exports ask for, as the recipe's tokenizer reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from graph.errors import QcError
from recipes.schema import Recipe

Reader = Callable[..., Iterator[dict[str, Any]]]


def text_reader(recipe: Recipe, cache: Path, tokenizer: Callable[[], Any]) -> Reader:
    """Batches of the text that a pass asks for, of documents that are trained on, never of those held out."""

    def read(data: Any, tokens: int, length: int, batch: int) -> Iterator[dict[str, Any]]:
        from runtimes.data.corpus import Corpus

        corpus = Corpus(data, recipe.file.parent)
        same: dict[str, Any] = {"tokenizer": tokenizer(), "length": length, "cache": cache, "seed": recipe.seed}
        rows = corpus.rows("train", enough=tokens, **same)
        seen = 0
        for start in range(0, len(rows), batch):
            left = -(-(tokens - seen) // length)
            found = rows.batch(range(start, min(start + batch, start + left, len(rows))))
            seen += int((found.attention_mask > 0).sum())
            yield {"input_ids": found.input_ids, "attention_mask": found.attention_mask}
            if seen >= tokens:
                return
        what = f"tokens is {tokens}, and the text has no more than {seen} to read in rows of {length}"
        raise QcError(what, fix=f"give more text, or set tokens to {seen}")

    return read
