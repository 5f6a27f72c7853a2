"""The loss on what staged cross-attention looks at: few documents at a position, and not the same ones everywhere.

    sparsity * mean_p H(w_p) - balance * H(mean_p w_p)

w_p are the weights that a coarse block gives to the documents at position p; means are over the positions of text of a
batch, and over coarse blocks. H is the entropy, in nats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graph import Graph, QcError
from runtimes.data import Batch
from runtimes.settings import Routing
from runtimes.train.losses import Features
from runtimes.train.objectives import Loss

TERMS = ("routing_sparsity", "routing_balance")


def weights_of(graph: Graph) -> list[fx.Node]:
    """The weights of documents, one output a coarse block, and at the end the document of every token of the memory."""
    found = [site.node for site in graph.sites("qc.document_weights")]
    if not found:
        fix = "insert insert-staged-gca, or take routing out of train"
        raise QcError("train has routing, and the model weighs no documents", fix=fix)
    return [*found, graph.sites("qc.memory_documents")[0].node]


@dataclass(frozen=True)
class RoutedLoss:
    """An objective, and the two terms beside it."""

    settings: Routing
    objective: Loss

    @property
    def terms(self) -> tuple[str, ...]:
        """Those of the objective, and the two entropies."""
        return (*self.objective.terms, *TERMS)

    def __call__(self, student: Features, batch: Batch, step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of a batch at optimizer step ``step``, and its terms: sums over the labels."""
        loss, terms = self.objective(student, batch, step)
        each, all_of_them = entropies(student.routing, batch.attention_mask > 0)
        labels = (batch.labels >= 0).sum()
        named = dict(zip(TERMS, (each.detach() * labels, all_of_them.detach() * labels), strict=True))
        routed = self.settings.sparsity * each - self.settings.balance * all_of_them
        return loss + routed * labels, {**terms, **named}

    def evaluate(self, student: Features, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the objective says of held-out text."""
        return self.objective.evaluate(student, batch)


def entropies(routing: Sequence[Tensor], text: Tensor) -> tuple[Tensor, Tensor]:
    """The mean entropy of a position's weights, and the entropy of the mean weights; means over coarse blocks.

    routing: the weights fp32 [B, T or 1, M] of each coarse block, and at the end the documents int [B, M]
    text: bool [B, T], the positions that count
    """
    *blocks, documents = routing
    each, everywhere = [], []
    count = int(documents.max()) if documents.numel() else 0
    for weights in blocks:
        by_document = _by_document(weights, documents, count).expand(-1, text.shape[1], -1)
        counted = text & (by_document.sum(-1) > 0)  # a row without a memory looks at nothing
        found = by_document[counted]  # [positions, documents]
        each.append(_entropy(found).sum() / max(len(found), 1))
        everywhere.append(_entropy(found.sum(0) / max(len(found), 1)))
    return torch.stack(each).mean(), torch.stack(everywhere).mean()


def _by_document(weights: Tensor, documents: Tensor, count: int) -> Tensor:
    """Weights [B, T, M], of last tokens alone, as those of documents: [B, T, documents]."""
    found = weights.new_zeros(*weights.shape[:2], count + 1)
    at = documents[:, None].expand(-1, weights.shape[1], -1)
    return found.scatter_add(2, at, weights)[..., 1:]


def _entropy(p: Tensor) -> Tensor:
    """Of the last dimension; its gradient is finite where a weight is 0."""
    return -(p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(-1)
