"""The objective kd-cache: what a cache says of every position, in named terms whose hard ones may fade."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from graph import QcError
from runtimes.data import Batch, Corpus
from runtimes.distill.reader import TaughtRows, TeacherCache
from runtimes.distill.sequences import documents_digest, tokenizer_digest
from runtimes.distill.targets import TaughtBatch
from runtimes.settings import KdCache, Train
from runtimes.train.candidates import HARD, Terms, candidate_loss
from runtimes.train.losses import Features


class CachedDistillation:
    """The loss of kd-cache."""

    def __init__(self, settings: KdCache, steps: int):
        self.settings, self.steps = settings, steps
        self.hard = {name: getattr(settings, name) for name in HARD if getattr(settings, name) > 0}
        self.terms = ("kl", *self.hard)

    def __call__(self, student: Features, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch at optimizer step ``step`` (0 is the first), and its terms: sums over the labels."""
        left = self.left(step)
        hard = {name: weight * left for name, weight in self.hard.items() if left > 0}
        return self._loss(student, batch, {"kl": 1.0, **hard})

    def left(self, step: int) -> float:
        """What is left of the hard weights: 1 at the first step, 0 from step ``anneal`` on."""
        falling = self.settings.anneal_steps(self.steps)
        return max(0.0, 1 - step / falling) if falling else 1.0

    def evaluate(self, student: Features, batch: Batch) -> tuple[Tensor, Tensor]:
        """The term kl, and the cross entropy of the text: sums over the labels."""
        _, found = self._loss(student, batch, {"kl": 1.0, "hard_text": 0.0})
        return found["kl"], found["hard_text"]

    def _loss(self, student: Features, batch: Batch, weights: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        assert isinstance(batch, TaughtBatch), "kd-cache trains on batches of its cache"
        if batch.targets.vocabulary != student.vocabulary:
            raise QcError(
                f"the teacher of the cache has {batch.targets.vocabulary} tokens and the student {student.vocabulary}",
                fix="distil from a teacher with the same tokenizer",
            )
        terms = Terms(temperature=self.settings.temperature, tail=self.settings.tail, weights=weights)
        return candidate_loss(student, batch.targets, terms)


def open_cache(
    settings: Train, objective: KdCache, *, tokenizer: Any, root: Path, seed: int
) -> tuple[TaughtRows, TaughtRows | None, tuple[str, ...]]:
    """What a training with kd-cache reads, what it is evaluated on, and what should be known of both."""
    if objective.cache is None:
        raise QcError(
            "the objective kd-cache has no cache",
            fix="give cache: the folder that qc cache teacher wrote, or the recipe that makes it",
        )
    cache = TeacherCache(root / objective.cache)
    if tokenizer is not None and tokenizer_digest(tokenizer) != cache.meta.tokenizer:
        raise QcError(
            f"the cache {cache.folder} was made with another tokenizer than the model's",
            fix="distil from a teacher with the same tokenizer",
        )
    if settings.data is not None and documents_digest(Corpus(settings.data, root)) != cache.meta.documents:
        raise QcError(
            f"train.data is not what the cache {cache.folder} was made of",
            fix="take data out of train: the cache has the text",
        )
    heldout = cache.rows("heldout", seed) if cache.meta.heldout else None
    return cache.rows("train", seed), heldout, cache.meta.notes
