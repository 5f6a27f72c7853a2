"""Vectors that stand for texts: how an encoder's states become one, and how far those of two encoders are apart.

embedding/cosine      mean cosine of the vectors that both make of the same text
embedding/spearman    correlation of the ranks of their similarities, over all pairs of texts
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from graph import Graph, QcError
from runtimes.evaluate import Batch
from runtimes.settings import Pooling

AT_MOST = 2048
"""Texts whose similarities are ranked, all pairs of them."""


def pooled(states: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """One vector a text.

    states: [B, T, d]    mask: int [B, T], 0 at padding  ->  [B, d], 0 where there is no text
    """
    there = (mask > 0)[..., None]
    if pooling == "cls":
        return states[:, 0] * there[:, 0]
    if pooling == "max":
        return states.masked_fill(~there, -torch.inf).amax(1).nan_to_num(neginf=0.0)
    return (states * there).sum(1) / there.sum(1).clamp(min=1)


def compare(graph: Graph, reference: Graph, batches: Iterable[Batch], pooling: Pooling = "mean") -> dict[str, float]:
    """How far the vectors of ``graph`` are from those of ``reference``; rows are texts, and not packed."""
    ours, theirs = [], []
    for batch in batches:
        ours.append(_vectors(graph, batch, pooling))
        theirs.append(_vectors(reference, batch, pooling))
    if sum(map(len, ours)) < 3:
        raise QcError("the data has fewer than three texts to compare", fix="give more held-out text")
    a, b = torch.cat(ours)[:AT_MOST], torch.cat(theirs)[:AT_MOST]
    upper = torch.triu_indices(len(a), len(a), 1).unbind()
    ranks = torch.stack([_ranks((x @ x.T)[upper]) for x in (a, b)])
    return {
        "embedding/cosine": float((a * b).sum(1).mean()),
        "embedding/spearman": float(torch.corrcoef(ranks)[0, 1]),
    }


def _vectors(graph: Graph, batch: Batch, pooling: Pooling) -> Tensor:
    """fp64 [rows, d], of length 1."""
    if graph.kind != "encoder":
        raise QcError("a language model makes no vectors of texts", fix="ask for perplexity, kl or top1 instead")
    with torch.inference_mode():
        states = graph(**{name: value.to(graph.device) for name, value in batch.inputs().items()})
        found = pooled(states.double(), batch.attention_mask.to(graph.device), pooling)
    return normalize(found, dim=-1).cpu()


def _ranks(values: Tensor) -> Tensor:
    """The place of each among all, equal ones in the order they come."""
    return values.argsort(stable=True).argsort().double()
