"""Rounding to fp16 that lets gradients through, as the Apple Neural Engine rounds, and as a deployed graph holds."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from graph.errors import QcError
from graph.ops import op

LARGEST = 65504.0
"""The largest fp16 number; what is beyond saturates to it."""


@op
def ste_fp16(x: Tensor) -> Tensor:
    """``fp16(clip(x, ±65504))`` in the dtype of ``x``. The gradient is 1 everywhere, where it saturates too.

    x: [...]  ->  like x

    Raises QcError under bf16 autocast: what is rounded there has but 8 bits, so that nothing would be left to round.
    """
    check_fp16(x)
    return straight_fp16(x)


def straight_fp16(x: Tensor) -> Tensor:
    """The same for what no autocast touches: tensors that are stored, not what is computed from inputs."""
    return _SteFp16.apply(x)


def check_fp16(x: Tensor) -> None:
    """Refuse to round inside bf16 autocast."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16:
        raise QcError(
            "fp16 rounding runs inside bf16 autocast, which rounds everything more coarsely already",
            fix="train in fp32: set precision to fp32, or take ste-fp16 out",
        )


def to_fp16(x: Tensor) -> Tensor:
    """The nearest fp16 number of every value, in the dtype of ``x``; beyond 65504 the largest one."""
    return x.clone() if x.dtype == torch.float16 else x.clamp(-LARGEST, LARGEST).half().to(x.dtype)


class _SteFp16(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return to_fp16(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which products are computed in the dtypes of their factors, whatever the training's precision."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)
