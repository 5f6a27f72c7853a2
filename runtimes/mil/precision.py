"""What becomes of a value behind each operation: the three modes.

fp32   Nothing is rounded. What differs from the graph is wrong in the package: the weights are those stored, the
       arithmetic is that of the reference.
fp16   Every result is rounded to its declared type: what a device with exact wide accumulation would find.
ane    fp16, and every quirk that was measured on some Neural Engine, all at once (``quirks.py``). No chip has them
       all, so this is a pessimistic union: what survives here has room to spare, what fails here may still work.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from graph.errors import QcError
from runtimes.mil.types import Dtype

Mode = Literal["fp32", "fp16", "ane"]
MODES: tuple[Mode, ...] = get_args(Mode)

SMALLEST_NORMAL = 2.0**-14
"""6.1e-5: below it, fp16 is subnormal."""


def known_mode(mode: str) -> Mode:
    """The mode of that name."""
    for known in MODES:
        if known == mode:
            return known
    raise QcError(f"no mode is called {mode!r}", fix=f"use {', '.join(MODES)}")


def settled(value: Tensor, dtype: Dtype, mode: Mode) -> Tensor:
    """A result as the mode leaves it. Only narrow floats are touched."""
    if mode == "fp32" or dtype.kind != "float" or dtype.bits != 16:
        return value
    narrow = torch.float16 if dtype.name == "fp16" else torch.bfloat16
    rounded = value.to(narrow).float()
    if mode == "fp16":
        return rounded
    rounded = torch.where(rounded.isnan(), torch.inf, rounded)  # N9
    return torch.where(rounded.abs() < SMALLEST_NORMAL, torch.zeros_like(rounded), rounded)  # N5
