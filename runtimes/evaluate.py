"""Measure a graph on held-out text: perplexity, and how far it is from a reference graph.

What is measured at is where a batch's labels say so; the labels never reach over the border of a document.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from graph import Graph, QcError

Metric: TypeAlias = Literal["perplexity", "kl", "top1"]

METRICS: tuple[Metric, ...] = ("perplexity", "kl", "top1")
"""``kl`` and ``top1`` need a reference."""

IGNORED = -100
"""The label of a position that nothing is measured at."""

CHUNK = 1 << 22
"""Logits that are looked at together: in fp32, what is held beside the graph's own is a few times 16 MiB."""


class Batch(Protocol):
    """Some rows of tokens: what ``runtimes.data`` and ``windows`` give."""

    @property
    def input_ids(self) -> Tensor:
        """int64 [B, T]."""

    @property
    def attention_mask(self) -> Tensor:
        """int64 [B, T]: 0 is padding, 1, 2, … the number of the document in its row."""

    @property
    def labels(self) -> Tensor:
        """int64 [B, T]: the token to predict *at* each position, that is the next one, or ``IGNORED``."""

    def inputs(self) -> Mapping[str, Tensor]:
        """What a graph reads of it, by the names of its inputs."""


@dataclass(frozen=True)
class Window:
    """A batch of stretches of documents."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def inputs(self) -> dict[str, Tensor]:
        """What a graph reads of it."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}


def windows(
    documents: Iterable[Sequence[int]], *, length: int, stride: int | None = None, batch: int = 8
) -> Iterator[Window]:
    """Batches of stretches of ``length`` tokens, each from one document, which begin ``stride`` tokens apart.

    Every token but the first of its document is measured once, with at least ``length - stride`` tokens before it
    wherever the document has them. Without ``stride`` it is half of ``length``.
    """
    step = max(1, length // 2) if stride is None else stride
    if length < 2 or not 1 <= step < length:
        raise QcError(
            f"windows of {length} tokens {step} apart leave tokens out", fix="give a stride from 1 to length - 1"
        )
    rows: list[tuple[Sequence[int], int]] = []
    for document in documents:
        for begin in range(0, max(len(document) - 1, 0), step):
            measured_from = 0 if begin == 0 else length - step - 1
            stretch = document[begin : begin + length]
            if len(stretch) - 1 > measured_from:
                rows.append((stretch, measured_from))
            if len(rows) == batch:
                yield _batch(rows)
                rows = []
    if rows:
        yield _batch(rows)


def _batch(rows: list[tuple[Sequence[int], int]]) -> Window:
    width = max(len(tokens) for tokens, _ in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for r, (tokens, measured_from) in enumerate(rows):
        ids[r, : len(tokens)] = torch.tensor(tokens)
        mask[r, : len(tokens)] = 1
        labels[r, measured_from : len(tokens) - 1] = ids[r, measured_from + 1 : len(tokens)]
    return Window(ids, mask, labels)


def evaluate(
    graph: Graph,
    batches: Iterable[Batch],
    *,
    reference: Graph | None = None,
    metrics: Sequence[Metric] = ("perplexity",),
    text_bytes: int | None = None,
) -> dict[str, float]:
    """What ``metrics`` asks for, over all measured positions of all batches.

    tokens           measured positions
    loss             mean negative log-likelihood of the labels, in nats
    perplexity       exp(loss)
    bits_per_byte    the summed negative log-likelihood in bits, over ``text_bytes``; where that is given
    kl               mean KL(reference || graph) of the two distributions, in nats
    top1             share of positions at which both find the same token likeliest

    One batch is held at a time; nothing of its logits is kept.
    """
    _check(graph, reference, metrics)
    sums: dict[str, float] = dict.fromkeys(("nll", "kl", "top1"), 0.0)
    tokens = 0
    compared = reference if {"kl", "top1"} & set(metrics) else None
    for batch in batches:
        at = batch.labels != IGNORED
        count = int(at.sum())
        if count == 0:
            continue
        tokens += count
        theirs = _logits(compared, batch, at) if compared is not None else None
        for name, value in _sums(_logits(graph, batch, at), batch.labels[at], theirs).items():
            sums[name] += value
    if tokens == 0:
        raise QcError("the data has nothing to measure", fix="give more held-out text, or longer rows")
    return _means(sums, tokens, metrics, text_bytes)


def _means(sums: dict[str, float], tokens: int, metrics: Sequence[str], text_bytes: int | None) -> dict[str, float]:
    found: dict[str, float] = {"tokens": tokens}
    if "perplexity" in metrics:
        loss = sums["nll"] / tokens
        found |= {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
        if text_bytes:
            found["bits_per_byte"] = sums["nll"] / math.log(2) / text_bytes
    return found | {name: sums[name] / tokens for name in ("kl", "top1") if name in metrics}


def _check(graph: Graph, reference: Graph | None, metrics: Sequence[str]) -> None:
    unknown = [m for m in metrics if m not in METRICS]
    if unknown or not metrics:
        what = f"no metric is called {unknown[0]!r}" if unknown else "no metric is asked for"
        raise QcError(what, fix=f"use some of {', '.join(METRICS)}")
    if graph.kind == "encoder":
        what = "an encoder predicts no tokens, so it has no perplexity"
        raise QcError(what, fix="ask for metrics: [embedding], and train with objective: embedding")
    missing = [m for m in metrics if m != "perplexity" and reference is None]
    if missing:
        raise QcError(
            f"{missing[0]} compares with a reference, and there is none", fix="give a reference, or leave it out"
        )
    if reference is not None and _width(graph) != _width(reference):
        what = f"the graph knows {_width(graph)} tokens and the reference {_width(reference)}"
        raise QcError(what, fix="compare models of one vocabulary")


def _width(graph: Graph) -> Any:
    return graph.output_nodes()[0].meta["val"].shape[-1]


def _logits(graph: Graph, batch: Batch, at: Tensor) -> Tensor:
    """The logits of the measured positions alone, [n, V]."""
    with torch.inference_mode():
        device = graph.device
        logits: Tensor = graph(**{name: value.to(device) for name, value in batch.inputs().items()})
        return logits[at.to(device)]


def _sums(ours: Tensor, labels: Tensor, theirs: Tensor | None) -> dict[str, float]:
    """The sums over positions of the negative log-likelihood, the divergence and the agreement, some rows at a time."""
    rows = max(1, CHUNK // ours.shape[-1])
    nll = kl = top1 = 0.0
    with torch.inference_mode():
        for begin in range(0, len(ours), rows):
            part = ours[begin : begin + rows].float()
            wanted = labels[begin : begin + rows].to(part.device)
            nll += cross_entropy(part, wanted, reduction="none").double().sum().item()
            if theirs is None:
                continue
            other = theirs[begin : begin + rows].float()
            top1 += float((part.argmax(-1) == other.argmax(-1).to(part.device)).sum())
            kl += _divergence(other.to(part.device), part)
    return {"nll": nll, "kl": kl, "top1": top1}


def _divergence(reference: Tensor, logits: Tensor) -> float:
    """Sum over rows of KL(softmax(reference) || softmax(logits)), in nats. Both: [n, V]."""
    p, q = torch.log_softmax(reference, -1), torch.log_softmax(logits, -1)
    return torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).double().sum().item()
