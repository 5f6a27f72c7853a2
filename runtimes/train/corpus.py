"""The rows a training reads, and those it is evaluated on; the two never share a document."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graph.errors import QcError
from runtimes.data import Corpus, Rows
from runtimes.data.corpus import Split
from runtimes.distill.reader import TaughtRows
from runtimes.retrieval import Questions
from runtimes.settings import KdCache, PythonStdlib, Retrieval, Train
from runtimes.train.cached import open_cache

NOTHING_HELD_OUT = "not evaluated: the data is a single document, so none can be held out; give eval_data"


@dataclass(frozen=True)
class Text:
    """What a training reads."""

    training: Rows | TaughtRows | Questions
    evaluation: Rows | TaughtRows | Questions | None
    notes: tuple[str, ...]


def open_text(
    settings: Train,
    *,
    tokenizer: Any,
    root: Path,
    cache: Path,
    seed: int,
    processes: int,
    memory_tokenizer: Any = None,
) -> Text:
    """Open the data; only as many documents are tokenized as ``processes`` processes will read.

    ``memory_tokenizer`` is that of an encoder which makes a memory; without it, ``tokenizer`` reads chunks too.
    """
    if isinstance(settings.objective, KdCache):
        return Text(*open_cache(settings, settings.objective, tokenizer=tokenizer, root=root, seed=seed))
    asked = questions_of(settings, tokenizer, memory_tokenizer or tokenizer, seed)
    if asked is not None:
        return asked
    corpus, other, split, eval_split = _sources(settings, root)
    reserved = other.split(eval_split)
    same: dict[str, Any] = {
        "tokenizer": tokenizer,
        "length": settings.length,
        "packing": settings.packing,
        "cache": cache,
    }
    a_pass = settings.batch * processes * settings.length
    enough = settings.steps * settings.accumulate * a_pass
    training = corpus.rows(split, seed=seed, without=reserved.keys(), enough=enough, **same)
    notes = _notes(training, settings)
    if not reserved:
        return Text(training, None, (*notes, NOTHING_HELD_OUT))
    evaluation = other.rows(eval_split, enough=settings.eval_batches * a_pass, **same)
    return Text(training, evaluation, notes)


def questions_of(settings: Train, tokenizer: Any, memory_tokenizer: Any, seed: int) -> Text | None:
    """Questions to train on, and those held out; None where the training reads text."""
    if not isinstance(settings.data, Retrieval):
        if isinstance(settings.eval_data, Retrieval):
            raise QcError("eval_data asks questions, and data is text", fix="give questions in both, or in none")
        return None
    other = settings.eval_data or settings.data
    if not isinstance(other, Retrieval):
        raise QcError("data asks questions, and eval_data is text", fix="give questions in both, or in none")
    read: dict[str, Any] = {
        "tokenizer": tokenizer, "memory_tokenizer": memory_tokenizer, "length": settings.length
    }  # fmt: skip
    return Text(Questions(settings.data, "train", seed=seed, **read), Questions(other, "heldout", **read), ())


def _sources(settings: Train, root: Path) -> tuple[Corpus, Corpus, Split, Split]:
    """What to train on and what to evaluate on, and of each which split.

    Given the same data for both, or none to evaluate on, a part is held out; of two different ones all is used. The
    standard library is always split, so that what the shipped model has never seen stays that way.
    """
    if settings.data is None:
        raise QcError("the training has no data", fix="give data: python-stdlib, text:, jsonl: or hf:")
    corpus = Corpus(settings.data, root)
    if settings.eval_data is None or settings.eval_data == settings.data:
        return corpus, corpus, "train", "heldout"
    split: Split = "train" if isinstance(settings.data, PythonStdlib) else "all"
    eval_split: Split = "heldout" if isinstance(settings.eval_data, PythonStdlib) else "all"
    return corpus, Corpus(settings.eval_data, root), split, eval_split


def _notes(rows: Rows, settings: Train) -> tuple[str, ...]:
    dropped = rows.layout.dropped
    if not dropped:
        return ()
    return (f"{dropped} documents left out: nothing of their answer lies within {settings.length} tokens",)
