"""Makes a cache. Which sequences a shard has, and in which batches they run, follows from its number alone.

So a cache that was killed goes on with the first shard that is missing, and ends in the bytes it would have had.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graph import Graph, QcError
from graph.weights import read_header
from runtimes.data import Batch
from runtimes.data.disk import explained, remove, replace_text, sweep
from runtimes.distill.layout import SPLITS, Meta, Split, expect_same, read_meta
from runtimes.distill.sequences import Sequences, Text, open_text, tokenizer_digest
from runtimes.distill.shards import LOCK, Shards, alone
from runtimes.distill.teacher import Said, Teacher
from runtimes.settings import Cache

Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Made:
    """A cache that is whole."""

    folder: Path
    sequences: int
    heldout: int
    shards: int
    written: int
    """Shards that this run wrote; the others were there."""

    bytes: int
    """Of the tensors of all shards, as predicted."""

    file_bytes: int
    """Of the shards with their headers."""

    bytes_per_token: float
    tokens: int
    """Tokens that this run asked the teacher of."""

    tokens_per_second: float
    """In this run, the files written; 0 where nothing was left to do."""

    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a cache is made of, beside its settings."""

    graph: Callable[[], Graph]
    """The teacher; asked for only if it has something left to say."""

    tokenizer: Any
    model: str
    """What the recipe calls the teacher."""

    teacher: str
    """The sha256 of the teacher's files."""

    dtype: str
    """The dtype that the teacher runs in."""

    root: Path
    """Where relative paths of the data start."""

    tokens: Path
    """Where tokens are kept."""


def make(settings: Cache, source: Source, folder: Path, *, seed: int, force: bool, tell: Tell) -> Made:
    """Make the cache that ``settings`` describe, or what is missing of it; ``force`` begins anew.

    Raises QcError where the folder holds another cache, a shard is damaged, or the disk is too small.
    """
    seed = settings.seed if settings.seed is not None else seed
    text = open_text(settings, tokenizer=source.tokenizer, root=source.root, cache=source.tokens, seed=seed)
    teacher = cache(lambda: _teacher(settings, source.graph(), seed))
    with explained("the teacher's cache", folder):
        if force and folder.exists():
            _expect_cache(folder)
            remove(folder)
        with alone(folder):
            found = read_meta(folder)
            vocabulary = found.vocabulary if found is not None else teacher().vocabulary
            meta = _meta(settings, source, text, vocabulary, seed)
            _begin(meta, found, folder)
            return _Writing(meta, teacher, {"train": text.train, "heldout": text.heldout}, folder, tell).run()


def _teacher(settings: Cache, graph: Graph, seed: int) -> Teacher:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    options = {"topk": settings.topk, "negatives": settings.negatives, "seed": seed}
    return Teacher(graph, device=device or torch.device("cpu"), **options)


def _meta(settings: Cache, source: Source, text: Text, vocabulary: int, seed: int) -> Meta:
    return Meta(
        model=source.model, teacher=source.teacher, dtype=source.dtype, vocabulary=vocabulary,
        tokenizer=tokenizer_digest(source.tokenizer), documents=text.documents, tokens=text.tokens,
        length=settings.length, topk=settings.topk, negatives=settings.negatives, train=text.train.count,
        heldout=text.heldout.count, shard=settings.shard, batch=settings.batch, packing=settings.packing,
        thinking=settings.thinking, seed=seed, notes=text.notes,
    )  # fmt: skip


def _expect_cache(folder: Path) -> None:
    if _has_files(folder) and not (folder / "meta.json").is_file():
        raise QcError(f"{folder} is no cache, and --force replaces nothing else", fix="give another folder: cache.out")


def _begin(meta: Meta, found: Meta | None, folder: Path) -> None:
    if found is not None:
        expect_same(found, meta, folder)
    elif _has_files(folder):
        raise QcError(f"{folder} holds something else than a cache", fix="give another folder: cache.out")
    sweep(folder)
    replace_text(folder / "meta.json", meta.text())


def _has_files(folder: Path) -> bool:
    return any(path.name != LOCK for path in folder.iterdir())


class _Writing:
    """One run of the writer."""

    def __init__(
        self, meta: Meta, teacher: Callable[[], Teacher], texts: dict[Split, Sequences], folder: Path, tell: Tell
    ):
        self.meta, self.teacher, self.texts, self.folder, self.tell = meta, teacher, texts, folder, tell
        self.shards = Shards(folder)
        self.names = {name: (split, numbers) for split in SPLITS for name, numbers in meta.shards(split).items()}

    def run(self) -> Made:
        """Write what is missing."""
        missing = [name for name in self.names if not self.shards.has(name)]
        self._predict(missing)
        for name in [name for name in self.names if name not in missing]:
            self.shards.check(name)
        tokens, began = 0, time.perf_counter()
        for nth, name in enumerate(missing, 1):
            split, numbers = self.names[name]
            self.shards.write(name, self._shard(split, numbers))
            tokens += len(numbers) * self.meta.length
            speed = tokens / (time.perf_counter() - began)
            left = sum(len(self.names[other][1]) for other in missing[nth:]) * self.meta.length / speed
            self.tell(f"{name}: {nth} of {len(missing)}, {speed:,.0f} tokens/s, {left:,.0f} s left")
        return self._made(len(missing), tokens, time.perf_counter() - began)

    def _predict(self, missing: list[str]) -> None:
        """Say how large the cache will be, and refuse to begin where it cannot fit."""
        meta, a_token = self.meta, self.meta.bytes_per_sequence() / self.meta.length
        total = meta.predicted_bytes()
        self.tell(
            f"{meta.train:,} sequences and {meta.heldout:,} held out, {meta.length} tokens each: "
            f"{a_token:.1f} bytes a token, {total / 1e6:,.1f} MB in {len(self.names)} shards"
        )
        for note in meta.notes:
            self.tell(note)
        done = len(self.names) - len(missing)
        if done:
            self.tell(f"{done} shards are there already")
        needed = sum(len(self.names[name][1]) for name in missing) * meta.bytes_per_sequence()
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise QcError(
                f"the cache needs {needed / 1e9:,.1f} GB more, and the disk of {self.folder} has {free / 1e9:,.1f} GB",
                fix="lower cache.sequences, topk or negatives, or set cache.out to a folder on another disk",
            )

    def _shard(self, split: Split, numbers: range) -> dict[str, Tensor]:
        shard, text = self.meta.empty(len(numbers)), self.texts[split]
        for some in text.batches(numbers, self.meta.batch):
            batch = text.batch(some)
            at = torch.tensor(some) - numbers.start
            self._put_text(shard, at, batch)
            self._put_said(shard, at, self._ask(batch, split, some), batch.labels.shape[1])
        return shard

    def _ask(self, batch: Batch, split: Split, some: range) -> Said:
        """A position has a number of its own in the whole cache, by which its negatives are drawn."""
        first = 0 if split == "train" else self.meta.train
        rows = torch.tensor(some)[:, None] + first
        numbers = rows * self.meta.length + torch.arange(batch.labels.shape[1])
        try:
            return self.teacher()(batch, numbers)
        except QcError as error:
            error.site = f"sequences {some.start} to {some[-1]} of {split}"
            raise

    def _put_text(self, shard: dict[str, Tensor], at: Tensor, batch: Batch) -> None:
        width = batch.labels.shape[1]
        for name, value in (("attention_mask", batch.attention_mask), ("labels", batch.labels)):
            shard[name][at, :width] = value.int()
        ids = torch.full((len(at), self.meta.length), 0)
        ids[:, :width] = batch.input_ids
        ids[:, width:] = batch.input_ids[:, -1:] * (batch.attention_mask[:, -1:] == 0)  # more of the same padding
        shard["input_ids"][at] = ids.int()

    def _put_said(self, shard: dict[str, Tensor], at: Tensor, said: Said, width: int) -> None:
        row, column = at[said.at // width], said.at % width
        assert not len(column) or int(column.max()) < self.meta.length - 1, "the last position has no next token"
        shard["logsumexp"][row, column] = said.logsumexp
        for name, (ids, logits) in (("topk", said.topk), ("negative", said.negatives)):
            if f"{name}_ids" in shard:
                shard[f"{name}_ids"][row, column] = ids.int()
                shard[f"{name}_logits"][row, column] = logits

    def _made(self, written: int, tokens: int, seconds: float) -> Made:
        stored = {name: read_header(self.folder / name).values() for name in self.names}
        held = sum(one.end - one.start for tensors in stored.values() for one in tensors)
        assert held == self.meta.predicted_bytes(), "the files are not as large as was predicted"
        return Made(
            folder=self.folder, sequences=self.meta.train, heldout=self.meta.heldout, shards=len(self.names),
            written=written, bytes=held, file_bytes=sum((self.folder / name).stat().st_size for name in self.names),
            bytes_per_token=self.meta.bytes_per_sequence() / self.meta.length, tokens=tokens,
            tokens_per_second=tokens / seconds if tokens else 0.0, notes=self.meta.notes,
        )  # fmt: skip
