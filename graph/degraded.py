"""Noise that a training fades out, as an op: a base that is made worse on purpose, and is itself again in the end."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from graph.ops import op


def fading(progress: float, until: float, kind: str) -> float:
    """What is left of the noise at ``progress``, 0 to 1 over a training: 1 at first, 0 from ``until`` on.

    ``linear`` is ``1 - progress / until``, ``cosine`` half a wave, ``none`` stays at 1 until then.
    """
    if progress >= until:
        return 0.0
    if kind == "none":
        return 1.0
    return 1.0 - progress / until if kind == "linear" else 0.5 * (1 + math.cos(math.pi * progress / until))


@op
def degrade(
    x: Tensor, sigma: float, p: float, training: bool, progress: float, until: float = 0.8, kind: str = "linear"
) -> Tensor:
    """Add noise of ``sigma`` times the root mean square of each token, then drop a share ``p``, both faded by progress.

    x: [..., d]  ->  like x; ``x`` itself when not training, or once all has faded
    """
    left = fading(progress, until, kind) if training else 0.0
    if left == 0.0:
        return x
    size = x.detach().float().pow(2).mean(-1, keepdim=True).sqrt().to(x.dtype)
    noisy = x + (sigma * left) * size * torch.randn_like(x)
    return torch.nn.functional.dropout(noisy, p * left, True)
