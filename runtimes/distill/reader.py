"""Reads a cache: batches with targets, in an order that the seed and a batch's number decide."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graph.errors import QcError
from runtimes.data.batches import order_of_epoch
from runtimes.distill.layout import SPLITS, Split, read_meta
from runtimes.distill.shards import Shards
from runtimes.distill.targets import Targets, TaughtBatch


class TeacherCache:
    """A cache on disk. It must be whole; a shard is hashed when it is first read."""

    def __init__(self, folder: Path):
        meta = read_meta(folder)
        if meta is None:
            raise QcError(f"there is no cache in {folder}", fix="make it: qc cache teacher RECIPE")
        self.folder, self.meta = folder, meta
        self.shards = Shards(folder)
        names = [name for split in SPLITS for name in meta.shards(split)]
        missing = [name for name in names if name not in self.shards.known]
        if missing:
            raise QcError(
                f"the cache {folder} is not whole: {len(missing)} of its {len(names)} shards are not written yet",
                fix="run qc cache teacher RECIPE again: it goes on where it was",
            )
        for name in names:
            self.shards.check_size(name)

    def rows(self, split: Split, seed: int = 0) -> TaughtRows:
        """The sequences of a split."""
        return TaughtRows(self, split, seed)


class TaughtRows:
    """The sequences of a split, as ``runtimes.data.Rows`` gives rows."""

    def __init__(self, cache: TeacherCache, split: Split, seed: int):
        self.cache, self.split, self.seed = cache, split, seed
        self.files = list(cache.meta.shards(split))
        self._order = lru_cache(maxsize=2)(self._order_of)

    def __len__(self) -> int:
        """Sequences in one epoch."""
        return self.cache.meta.sequences(self.split)

    @property
    def key(self) -> str:
        """The sha256 of what the cache was made of, and of what is in it."""
        said = [self.cache.meta.key(), *sorted(one.sha256 for one in self.cache.shards.known.values())]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    def shuffled(self, first: int, count: int) -> TaughtBatch:
        """``count`` sequences of the endless sequence of shuffled epochs, from number ``first`` on."""
        numbers = (divmod(n, len(self)) for n in range(first, first + count))
        return self.batch([int(self._order(epoch)[at]) for epoch, at in numbers])

    def batch(self, rows: Sequence[int]) -> TaughtBatch:
        """The sequences of these numbers, no longer than the longest of them, rounded up to 8."""
        found = [self._sequence(row) for row in rows]
        whole = {name: torch.from_numpy(np.stack([one[name] for one in found])) for name in found[0]}
        used = int((whole["attention_mask"] > 0).sum(1).max())
        width = min(-(-max(used, 1) // 8) * 8, self.cache.meta.length)
        ids, mask, labels = (whole[name][:, :width].long() for name in ("input_ids", "attention_mask", "labels"))
        return TaughtBatch(ids, mask, labels, targets=self._targets(whole, labels))

    def _targets(self, whole: dict[str, Tensor], labels: Tensor) -> Targets:
        valid = labels >= 0
        row, column = torch.nonzero(valid, as_tuple=True)
        ids, logits = [whole["topk_ids"][row, column]], [whole["topk_logits"][row, column]]
        if "negative_ids" in whole:
            ids.append(whole["negative_ids"][row, column])
            logits.append(whole["negative_logits"][row, column])
        return Targets(
            rows=row * labels.shape[1] + column,
            ids=torch.cat(ids, 1).long(),
            logits=torch.cat(logits, 1),
            logsumexp=whole["logsumexp"][row, column],
            labels=labels[valid],
            vocabulary=self.cache.meta.vocabulary,
        )

    def _sequence(self, number: int) -> dict[str, NDArray[Any]]:
        shard, at = divmod(number, self.cache.meta.shard)
        tensors = self.cache.shards.tensors(self.files[shard], self.cache.meta)
        return {name: value[at] for name, value in tensors.items()}

    def _order_of(self, epoch: int) -> NDArray[np.int64]:
        return order_of_epoch(self.seed, epoch, len(self))
