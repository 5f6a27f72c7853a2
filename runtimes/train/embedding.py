"""The objective embedding: an encoder that makes of a text what its teacher does.

    1 - cos(e, t) + states * mean over tokens of (1 - cos(h, g)) + relations * mean over pairs of (e.e' - t.t')^2

e and t are the vectors, of length 1, that student and teacher make of a text, h and g their states at one token of it.
The means are over the texts of a batch, all tokens in it, and all pairs of its texts, whose likeness is compared:
what all texts have in common does not count there (similarity-preserving distillation, arXiv:1907.09682).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from runtimes.data import Batch
from runtimes.embeddings import pooled
from runtimes.settings import Embedding
from runtimes.train.losses import Features


@dataclass(frozen=True)
class EmbeddingLoss:
    """The objective, with a teacher that runs beside the student."""

    settings: Embedding
    teacher: Callable[[Batch], Features]

    terms: ClassVar[tuple[str, ...]] = ("embedding", "states", "relations")

    def __call__(self, student: Features, batch: Batch, step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of a batch, at whatever step, and its terms: times the labels, as other objectives sum up."""
        with torch.no_grad():
            wanted = self._states(self.teacher(batch), batch)
        found, text = self._states(student, batch), batch.attention_mask > 0
        ours, theirs = (pooled(x, batch.attention_mask, self.settings.pooling) for x in (found, wanted))
        ours, theirs = (normalize(x[text.any(1)], dim=-1) for x in (ours, theirs))
        whole = 1 - (ours * theirs).sum(-1).mean()
        pairs = (ours @ ours.T - theirs @ theirs.T).square().sum() / max(len(ours) * (len(ours) - 1), 1)
        each = 1 - cosine_similarity(found[text], wanted[text], dim=-1).mean()
        labels = (batch.labels >= 0).sum()
        parts = {"embedding": whole, "states": each, "relations": pairs}
        loss = whole + self.settings.states * each + self.settings.relations * pairs
        return loss * labels, {name: value.detach() * labels for name, value in parts.items()}

    def evaluate(self, student: Features, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss on held-out text; it has no cross entropy, as nothing is predicted."""
        loss, _ = self(student, batch, 0)
        return loss, torch.full_like(loss, torch.nan)

    def _states(self, found: Features, batch: Batch) -> Tensor:
        return found.x.view(*batch.input_ids.shape, -1).float()
