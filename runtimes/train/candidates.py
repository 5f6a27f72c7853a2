"""Distillation from a few candidates a position, without the logits of the others; full-vocabulary terms by chunks.

A position has C candidates with the teacher's logits t (the first is its likeliest token) and a student's logits z.
Each term is summed over the positions:

kl          T² Σ_j p_j (log p_j - log q_j),  p = softmax(t / T), q = softmax(z / T) over the candidates
hard_top1   cross entropy of the first candidate among the candidates, at temperature 1
hard_full   cross entropy of the first candidate in the full vocabulary
hard_text   cross entropy of the text's own next token in the full vocabulary

With ``tail``, p and q have one more class for all tokens that are no candidates: its logit is the logarithm of the sum
of their exponentials, at temperature 1, and is divided by T as one token's would be. The teacher's follows from the
stored logsumexp, the student's needs all of its logits.

Without a full-vocabulary term only the candidates' rows of the head are read. With one, a few rows of logits are made
at a time: z is read from them, the candidates are struck out, and what is left becomes the shares of the other tokens
within their sum ("the rest"), in place. Loss and gradient then depend on z, the rest's logit and the text's alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runtimes.distill.targets import Targets
from runtimes.train.losses import Features

GATHERED_AT_ONCE = 1 << 21
"""Elements of the head's rows that are held at a time: 8 MiB in fp32."""

LOGITS_AT_ONCE = 1 << 24
"""Elements of the logits that are held at a time where a term needs them all: 64 MiB in fp32, once."""

NO_TAIL = 1e-6
"""A share of the teacher's below this is the rounding of its logsumexp."""

HARD = ("hard_top1", "hard_full", "hard_text")
NAMES = ("kl", *HARD)


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Which terms there are, and the weight of each in the loss."""

    temperature: float
    tail: bool = False
    weights: Mapping[str, float]
    """Weights of the terms that are worked out; one may be 0."""

    @property
    def full(self) -> bool:
        """Whether the student's whole vocabulary is needed."""
        return self.tail or "hard_full" in self.weights or "hard_text" in self.weights


def candidate_loss(student: Features, targets: Targets, terms: Terms) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the terms, and each term's own sum over the positions: fp32 scalars."""
    total, sums = _Candidates.apply(student.x, student.weight, student.bias, targets, terms)  # type: ignore[no-untyped-call]
    return total, dict(zip(terms.weights, sums.unbind(), strict=True))


class _Candidates(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, targets: Targets, terms: Terms
    ) -> tuple[Tensor, Tensor]:
        student = Features(x, weight, bias)
        gradients = [
            None if value is None or not need else torch.zeros_like(value)
            for value, need in zip((x, weight, bias), ctx.needs_input_grad[:3], strict=True)
        ]
        sums = torch.zeros(len(terms.weights), dtype=torch.float32, device=x.device)
        step = _by_vocabulary if terms.full else _by_candidates
        with torch.autocast(x.device.type, enabled=False):
            every = torch.arange(len(targets.rows), device=x.device)
            for at in torch.split(every, _at_once(student, targets, terms)):
                sums += step(student, targets.part(at), terms, gradients)
        ctx.gradients = gradients
        ctx.mark_non_differentiable(sums)
        return sums @ sums.new_tensor(list(terms.weights.values())), sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if g is None else g.mul_(grad.to(g.dtype)) for g in ctx.gradients]
        ctx.gradients = None
        return (*scaled, None, None)


def _at_once(student: Features, targets: Targets, terms: Terms) -> int:
    if terms.full:
        return max(LOGITS_AT_ONCE // student.vocabulary, 16)
    width = 1 if student.weight is None else student.weight.shape[1]
    return max(GATHERED_AT_ONCE // (targets.ids.shape[1] * width), 1)


def _by_candidates(student: Features, t: Targets, terms: Terms, gradients: list[Tensor | None]) -> Tensor:
    """The sums of the terms at some positions, from the candidates' logits alone; adds to the gradients."""
    d_x, d_weight, d_bias = gradients
    x = student.x[t.rows]
    if student.weight is None:
        sums, d_z, *_ = _sums_and_gradients(x.gather(1, t.ids).float(), None, None, t, terms)
        if d_x is not None:
            d_x[t.rows] = torch.zeros_like(x).scatter_(1, t.ids, d_z.to(x.dtype))
        return sums
    chosen = torch.embedding(student.weight, t.ids).to(x.dtype)  # [n, C, d]
    z = torch.bmm(chosen, x[:, :, None]).squeeze(2)
    if student.bias is not None:
        z = z + student.bias[t.ids].to(z.dtype)
    sums, d_z, *_ = _sums_and_gradients(z.float(), None, None, t, terms)
    d_low = d_z.to(x.dtype)
    if d_x is not None:
        d_x[t.rows] = torch.bmm(d_low[:, None, :], chosen).squeeze(1)
    if d_weight is not None:
        outer = d_low[:, :, None] * x[:, None, :]
        d_weight.index_add_(0, t.ids.flatten(), outer.flatten(0, 1).to(d_weight.dtype))
    if d_bias is not None:
        d_bias.index_add_(0, t.ids.flatten(), d_z.flatten().to(d_bias.dtype))
    return sums


def _by_vocabulary(student: Features, t: Targets, terms: Terms, gradients: list[Tensor | None]) -> Tensor:
    """The same from all logits, which are turned into their gradient in place."""
    d_x, d_weight, d_bias = gradients
    logits, x = student.logits(t.rows)
    label = t.labels[:, None]
    z, text = logits.gather(1, t.ids), logits.gather(1, label).squeeze(1)
    lowest = torch.finfo(logits.dtype).min / 4
    top = logits.scatter_(1, t.ids, lowest).amax(1, keepdim=True)
    sums_of_rest = logits.sub_(top).exp_().sum(1, keepdim=True)
    rest = (top + sums_of_rest.log()).squeeze(1)
    sums, d_z, d_rest, d_text = _sums_and_gradients(z, rest, text, t, terms)
    if d_x is None and d_weight is None and d_bias is None:
        return sums
    logits.mul_(d_rest[:, None] / sums_of_rest)
    logits.scatter_(1, t.ids, d_z).scatter_add_(1, label, d_text[:, None])
    d_logits = logits.to(x.dtype)
    if d_x is not None:
        d_x[t.rows] = d_logits if student.weight is None else d_logits @ student.weight.to(x.dtype)
    if d_weight is not None:
        d_weight += (d_logits.t() @ x).to(d_weight.dtype)
    if d_bias is not None:
        d_bias += logits.sum(0).to(d_bias.dtype)
    return sums


def _sums_and_gradients(
    z: Tensor, rest: Tensor | None, text: Tensor | None, t: Targets, terms: Terms
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sums of the terms, and the gradient of their weighted sum for what they depend on; all of it is small.

    z: fp32 [n, C]    rest, text: fp32 [n]
    """
    leaves = [z, *(value if value is not None else z[:, 0].detach().clone() for value in (rest, text))]
    with torch.enable_grad():
        z, other, own = (leaf.detach().requires_grad_() for leaf in leaves)
        sums = torch.stack([_term(name, z, other, own, t, terms) for name in terms.weights])
        total = sums @ sums.new_tensor(list(terms.weights.values()))
        d_z, d_rest, d_text = torch.autograd.grad(total, (z, other, own), allow_unused=True, materialize_grads=True)
    return sums.detach(), d_z, d_rest, d_text


def _term(name: str, z: Tensor, rest: Tensor, text: Tensor, t: Targets, terms: Terms) -> Tensor:
    if name == "kl":
        return _divergence(z, rest, t, terms)
    among = torch.logsumexp(z, 1)
    if name == "hard_top1":
        return (among - z[:, 0]).sum()
    everything = torch.logaddexp(among, rest)
    return (everything - (z[:, 0] if name == "hard_full" else text)).sum()


def _divergence(z: Tensor, rest: Tensor, t: Targets, terms: Terms) -> Tensor:
    wanted = t.logits.float()
    if terms.tail and z.shape[1] < t.vocabulary:
        wanted = torch.cat([wanted, _tail(wanted, t.logsumexp)[:, None]], 1)
        z = torch.cat([z, rest[:, None]], 1)
    log_p = torch.log_softmax(wanted / terms.temperature, 1)
    log_q = torch.log_softmax(z / terms.temperature, 1)
    return terms.temperature**2 * (log_p.exp() * (log_p - log_q)).sum()


def _tail(logits: Tensor, logsumexp: Tensor) -> Tensor:
    """The logit of all that the teacher's candidates leave over: [n, C], [n] -> [n]."""
    share = -torch.expm1(torch.logsumexp(logits, 1) - logsumexp)
    left = logsumexp + share.clamp(min=NO_TAIL).log()
    return torch.where(share > NO_TAIL, left, torch.finfo(logits.dtype).min / 4)
