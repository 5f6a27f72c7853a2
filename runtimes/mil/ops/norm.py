"""Normalisations."""

from __future__ import annotations

import torch
from torch import Tensor

from runtimes.mil.ops.table import op


def _channels(value: Tensor, x: Tensor) -> Tensor:
    return value.reshape(1, -1, *[1] * (x.ndim - 2))


@op()
def layer_norm(
    x: Tensor,
    axes: list[int] | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    """Gain and shift have the lengths of ``axes``."""
    along = sorted(a % x.ndim for a in (range(x.ndim) if axes is None else axes))
    centred = x - x.mean(along, True)
    result = centred * torch.rsqrt(centred.square().mean(along, True) + epsilon)
    shape = [x.shape[i] if i in along else 1 for i in range(x.ndim)]
    if gamma is not None:
        result = result * gamma.reshape(shape)
    return result if beta is None else result + beta.reshape(shape)


@op()
def instance_norm(x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: float = 1e-5) -> Tensor:
    along = list(range(2, x.ndim))
    centred = x - x.mean(along, True)
    result = centred * torch.rsqrt(centred.square().mean(along, True) + epsilon)
    if gamma is not None:
        result = result * _channels(gamma, x)
    return result if beta is None else result + _channels(beta, x)


@op()
def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    result = (x - _channels(mean, x)) * torch.rsqrt(_channels(variance, x) + epsilon)
    if gamma is not None:
        result = result * _channels(gamma, x)
    return result if beta is None else result + _channels(beta, x)


@op()
def l2_norm(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Over the last three axes."""
    return x * torch.rsqrt(x.square().sum([-3, -2, -1], True) + epsilon)
