"""How the next token is chosen from the logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graph.errors import QcError, raise_all


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen, and when to stop. The filters work in the order of ``transformers``."""

    max_tokens: int = 128
    """Most tokens to generate."""

    temperature: float = 0.0
    """What the logits are divided by; 0 takes the most likely token."""

    top_p: float = 1.0
    """Sample among the likeliest tokens that together hold this share (arXiv:1904.09751)."""

    top_k: int = 0
    """Sample among this many tokens; 0 among all."""

    repetition_penalty: float = 1.0
    """What the logits of tokens seen before are divided by, or times where they are negative (arXiv:1909.05858)."""

    seed: int = 0
    """Seed of the first row; each further row has the next."""

    stop: tuple[str, ...] = ()
    """Texts that end the generation; they are not part of it."""

    def __post_init__(self) -> None:
        penalty = self.repetition_penalty
        wrong = [
            QcError(f"{name} is {value}", fix=f"give {rule}")
            for name, value, good, rule in (
                ("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1"),
                ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "0, or a number above it"),
                ("top_p", self.top_p, 0 < self.top_p <= 1, "a number above 0, at most 1"),
                ("top_k", self.top_k, self.top_k >= 0, "0 for all tokens, or their number"),
                ("repetition_penalty", penalty, 0 < penalty < float("inf"), "1 for none, or a number above 0"),
                ("stop", self.stop, all(self.stop), "texts that are not empty"),
            )
            if not good
        ]
        raise_all(wrong)


class Chooser:
    """Chooses tokens for some rows, which do not depend on each other."""

    def __init__(self, sampling: Sampling, rows: int, device: torch.device):
        self.sampling = sampling
        self.random = [torch.Generator(device=device).manual_seed(sampling.seed + row) for row in range(rows)]

    def __call__(self, logits: Tensor, seen: Sequence[Sequence[int]]) -> Tensor:
        """The next token of every row.

        logits: [B, V]    seen: the tokens of each row so far  ->  int64 [B]
        """
        logits = logits.float()
        if bool(torch.isnan(logits).any()):
            fix = "a weight or an activation overflows, as fp16 does above 65504: generate in fp32"
            raise QcError("the model's logits are not numbers (NaN)", fix=fix)
        if self.sampling.repetition_penalty != 1.0:
            logits = penalized(logits, seen, self.sampling.repetition_penalty)
        if self.sampling.temperature == 0:
            return logits.argmax(-1)
        kept = filtered(logits / self.sampling.temperature, self.sampling.top_k, self.sampling.top_p)
        shares = torch.softmax(kept, dim=-1)
        return torch.cat([torch.multinomial(row, 1, generator=g) for row, g in zip(shares, self.random, strict=True)])


def penalized(logits: Tensor, seen: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """``logits`` [B, V] with those of the tokens seen moved towards less likely."""
    result = logits.clone()
    for row, tokens in zip(result, seen, strict=True):
        index = torch.tensor(sorted(set(tokens)), device=logits.device)
        row[index] = torch.where(row[index] < 0, row[index] * penalty, row[index] / penalty)
    return result


def filtered(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """``logits`` [B, V] with -inf for all but the ``top_k`` largest, and those outside the share ``top_p``."""
    if top_k:
        smallest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=False)
        below = torch.softmax(ordered, dim=-1).cumsum(-1) <= 1 - top_p
        below[:, -1] = False  # the likeliest always stays
        logits = logits.masked_fill(torch.zeros_like(below).scatter(1, order, below), -torch.inf)
    return logits
