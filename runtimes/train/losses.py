"""Cross entropy and distillation, a few rows at a time, head and all.

A language model's logits are its largest tensor by far, and a plain loss holds several fp32 copies of it. Here the
head's matmul and the loss are one: some rows of logits are made, their gradient is worked out at once, and both are
dropped before the next rows. What is kept for the backward is the gradient of the head's input (and of its weight).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LOGITS_AT_ONCE = 1 << 22
"""Elements of the logits that are held at a time: 16 MiB in fp32."""


@dataclass(frozen=True)
class Features:
    """What logits are made of: ``x @ weight.T + bias``, or ``x`` itself where there is no weight."""

    x: Tensor
    """[rows, d], or [rows, vocabulary]"""

    weight: Tensor | None = None
    """[vocabulary, d]"""

    bias: Tensor | None = None
    """[vocabulary]"""

    layers: tuple[tuple[Tensor, Tensor], ...] = ()
    """Input and output of every layer, where these are compared too."""

    routing: tuple[Tensor, ...] = ()
    """What staged cross-attention looked at, where that is trained too: see ``routing.weights_of``."""

    @property
    def vocabulary(self) -> int:
        """How many logits there are."""
        return int((self.x if self.weight is None else self.weight).shape[0 if self.weight is not None else -1])

    def logits(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The fp32 logits of some rows, to be overwritten as the caller likes, and the rows of ``x``."""
        x = self.x[rows]
        if self.weight is None:
            return x.float() if x.dtype != torch.float32 else x.clone(), x
        logits = torch.nn.functional.linear(
            x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        )
        return logits.float(), x


def whole_answers(student: Features, labels: Tensor, documents: Tensor) -> tuple[int, int]:
    """Of how many documents every label is the likeliest token, and how many have labels.

    labels, documents: int64 [B, T]; the second has the number of the document in its row
    """
    rows, columns = torch.nonzero(labels >= 0, as_tuple=True)
    wrong = torch.zeros(len(labels), int(documents.max()) + 1, dtype=torch.bool, device=labels.device)
    asked = torch.zeros_like(wrong)
    asked[rows, documents[rows, columns]] = True
    at_once = max(1, LOGITS_AT_ONCE // student.vocabulary)
    for begin in range(0, len(rows), at_once):
        row, column = rows[begin : begin + at_once], columns[begin : begin + at_once]
        logits, _ = student.logits(row * labels.shape[1] + column)
        bad = logits.argmax(-1) != labels[row, column]
        wrong[row[bad], documents[row, column][bad]] = True
    return int((asked & ~wrong).sum()), int(asked.sum())


@dataclass(frozen=True)
class Distilled:
    """What a student takes from its teacher."""

    teacher: Features
    temperature: float
    alpha: float


def cross_entropy(student: Features, labels: Tensor) -> Tensor:
    """The summed cross entropy in nats of the positions that have a label.

    student: [rows, …]    labels: int64 [rows], negative where there is none  ->  fp32 scalar
    """
    total: Tensor = _Chunked.apply(student.x, student.weight, student.bias, labels, None)  # type: ignore[no-untyped-call]
    return total


def distillation(student: Features, labels: Tensor, distilled: Distilled) -> Tensor:
    """``alpha * T² * KL(teacher ‖ student) + (1 - alpha) * CE``, summed over the positions that have a label.

    Both sides are softened by the temperature T; T² keeps the size of the gradient (Hinton, arXiv:1503.02531).
    """
    total: Tensor = _Chunked.apply(student.x, student.weight, student.bias, labels, distilled)  # type: ignore[no-untyped-call]
    return total


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, labels: Tensor, distilled: Distilled | None
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            total, gradients = _loss(Features(x, weight, bias), labels, distilled, ctx.needs_input_grad[:3])
        ctx.gradients = gradients
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if g is None else g.mul_(grad.to(g.dtype)) for g in ctx.gradients]
        ctx.gradients = None
        return (*scaled, None, None)


def _loss(
    student: Features, labels: Tensor, distilled: Distilled | None, needed: tuple[bool, ...]
) -> tuple[Tensor, list[Tensor | None]]:
    kept = torch.nonzero(labels >= 0).squeeze(1)
    d_x, d_weight, d_bias = (
        None if value is None or not need else torch.zeros_like(value)
        for value, need in zip((student.x, student.weight, student.bias), needed, strict=True)
    )
    total = torch.zeros((), dtype=torch.float32, device=labels.device)
    for rows in torch.split(kept, max(LOGITS_AT_ONCE // student.vocabulary, 16)):
        logits, x = student.logits(rows)
        total += _soften(logits, labels[rows], distilled, rows) if distilled else _harden(logits, labels[rows])
        if d_x is None and d_weight is None and d_bias is None:
            continue
        d_logits = logits.to(x.dtype)
        if d_x is not None:
            d_x[rows] = d_logits if student.weight is None else d_logits @ student.weight.to(x.dtype)
        if d_weight is not None:
            d_weight += (d_logits.t() @ x).to(d_weight.dtype)
        if d_bias is not None:
            d_bias += logits.sum(0).to(d_bias.dtype)
    return total, [d_x, d_weight, d_bias]


def _harden(logits: Tensor, labels: Tensor) -> Tensor:
    """The summed cross entropy; ``logits`` [rows, vocabulary] are overwritten by their gradient."""
    at = labels[:, None]
    wanted = logits.gather(1, at).sum()
    top = logits.amax(1, keepdim=True)
    sums = logits.sub_(top).exp_().sum(1, keepdim=True)
    logits.div_(sums)
    logits.scatter_add_(1, at, logits.new_full((), -1.0).expand_as(at))
    return (top + sums.log()).sum() - wanted


def _soften(logits: Tensor, labels: Tensor, distilled: Distilled, rows: Tensor) -> Tensor:
    """The summed mix of both losses; ``logits`` are overwritten by their gradient."""
    t, alpha = distilled.temperature, distilled.alpha
    wanted, _ = distilled.teacher.logits(rows)
    log_p = torch.log_softmax(wanted.div_(t), dim=1)
    log_q = torch.log_softmax(logits / t, dim=1)
    p = log_p.exp()
    total = (alpha * t * t) * (p * (log_p - log_q)).sum()
    d_soft = log_q.exp_().sub_(p).mul_(alpha * t)
    if alpha == 1.0:
        logits.copy_(d_soft)
        return total
    total = total + (1 - alpha) * _harden(logits, labels)
    logits.mul_(1 - alpha).add_(d_soft)
    return total
