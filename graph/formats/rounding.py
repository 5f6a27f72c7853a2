"""Rounding stored values to a smaller float type, never silently to infinity."""

from __future__ import annotations

import torch
from torch import Tensor

from graph.errors import QcError
from graph.text import DTYPES


def rounded(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """``value`` in ``dtype``. A finite number that ``dtype`` has no finite number for is an error that names it."""
    result = value.to(dtype)
    lost = result.isinf() & value.isfinite()
    if bool(lost.any()):
        largest = value[lost].abs().max().item()
        raise QcError(
            f"{name} holds {largest:g}, and the largest {DTYPES[dtype]} number is {torch.finfo(dtype).max:g}",
            fix="use bf16, which has the range of fp32, or leave this tensor out",
        )
    return result
