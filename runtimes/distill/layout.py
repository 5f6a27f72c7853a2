"""What a cache holds, and how many bytes that takes.

meta.json                    what it was made of and how: ``Meta``
index.json                   of every shard its sha256, bytes and sequences
train-00000.safetensors      the first ``shard`` sequences, and so on
heldout-00000.safetensors    of documents that are not among the former

A shard of n sequences of L tokens holds, with K likeliest tokens and R negatives:

input_ids        int32 [n, L]
attention_mask   int32 [n, L]          0 is padding, 1, 2, … the number of the document in its row
labels           int32 [n, L]          the token to predict at each position, or -100
topk_ids         int32 [n, L-1, K]     sorted by logit: the first is the teacher's choice
topk_logits      fp16  [n, L-1, K]     as the teacher gave them, not divided by a temperature
negative_ids     int32 [n, L-1, R]     only where R > 0
negative_logits  fp16  [n, L-1, R]
logsumexp        fp32  [n, L-1]        of the whole vocabulary

A position with no label holds zeros. ``logsumexp`` counts the stored tokens as they are stored, rounded to fp16, and
all others as they were, so that one minus what is stored is the share of the rest, however small it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from graph.errors import QcError

FORMAT = 1
Split: TypeAlias = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = get_args(Split)
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Meta:
    """What a cache was made of. Two caches of one ``Meta`` have the same bytes, on one machine."""

    format: int = FORMAT
    model: str
    """What the recipe calls the teacher."""

    teacher: str
    """The sha256 of the teacher's files."""

    dtype: str
    """The dtype that the teacher ran in."""

    vocabulary: int
    """Logits of the teacher."""

    tokenizer: str
    """The sha256 of the tokenizer's tokens and their numbers."""

    documents: str
    """The sha256 of all documents of the data."""

    tokens: str
    """The sha256 of the tokens that the sequences were cut from."""

    length: int
    topk: int
    negatives: int
    train: int
    """Sequences for training."""

    heldout: int
    """Sequences for evaluation."""

    shard: int
    """Sequences in a file."""

    batch: int
    packing: bool
    thinking: str | None
    seed: int
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What a user should know."""

    def sequences(self, split: Split) -> int:
        """How many a split has."""
        return self.train if split == "train" else self.heldout

    def shards(self, split: Split) -> dict[str, range]:
        """The files of a split, and the sequences in each."""
        count = self.sequences(split)
        starts = range(0, count, self.shard)
        return {f"{split}-{n:05}.safetensors": range(s, min(s + self.shard, count)) for n, s in enumerate(starts)}

    def shapes(self, sequences: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The tensors of a shard."""
        n, length = sequences, self.length
        rows: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            name: ((n, length), torch.int32) for name in ("input_ids", "attention_mask", "labels")
        }
        rows["logsumexp"] = ((n, length - 1), torch.float32)
        for name, count in (("topk", self.topk), ("negative", self.negatives)):
            if count:
                rows[f"{name}_ids"] = ((n, length - 1, count), torch.int32)
                rows[f"{name}_logits"] = ((n, length - 1, count), torch.float16)
        return rows

    def empty(self, sequences: int) -> dict[str, Tensor]:
        """A shard that says nothing yet."""
        made = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in self.shapes(sequences).items()}
        made["labels"].fill_(IGNORED)
        return made

    def bytes_per_sequence(self) -> int:
        """12 L + (L - 1) (6 (K + R) + 4): the tensors, without the few hundred bytes of a file's header."""
        return sum(_bytes(shape, dtype) for shape, dtype in self.shapes(1).values())

    def predicted_bytes(self) -> int:
        """The tensors of all shards."""
        return (self.train + self.heldout) * self.bytes_per_sequence()

    def key(self) -> str:
        """The sha256 of all that decides the content."""
        content = {k: v for k, v in asdict(self).items() if k != "notes"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def text(self) -> str:
        """The content of meta.json."""
        return json.dumps(asdict(self), indent=1) + "\n"


def read_meta(folder: Path) -> Meta | None:
    """The ``Meta`` of a folder; None where there is none."""
    path = folder / "meta.json"
    if not path.is_file():
        return None
    try:
        found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found.get("format") != FORMAT:
            raise QcError(
                f"{path} is of format {found.get('format')}, and this qc reads {FORMAT}",
                fix="make the cache again: qc cache teacher RECIPE --force",
            )
        return Meta(**{**found, "notes": tuple(found["notes"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise QcError(f"{path} is damaged", fix="make the cache again: qc cache teacher RECIPE --force") from None


def expect_same(found: Meta, wanted: Meta, folder: Path) -> None:
    """Refuse to go on with a cache that was begun otherwise."""
    for one in fields(Meta):
        before, now = getattr(found, one.name), getattr(wanted, one.name)
        if one.compare and before != now:
            raise QcError(
                f"{folder} holds another cache: its {one.name} is {_short(before)}, not {_short(now)}",
                fix="write to another folder (cache.out), or make it anew with --force",
            )


def _short(value: object) -> str:
    said = str(value)
    return said if len(said) <= 24 else f"{said[:12]}…"


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    count = dtype.itemsize
    for size in shape:
        count *= size
    return count
