"""Memory for large tensors: fresh pages of the usual size cost as much as filling them.

Linux gives pages of 2 MB to whoever asks for them; elsewhere this is the usual memory.
"""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

LARGE = 32 << 20
"""Bytes from which on large pages are asked for. Less than that glibc gives again once it is free, pages and all."""


def room(size: int) -> Tensor:
    """So many bytes on the CPU, to be written to: u8 [size]."""
    if size < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        return torch.empty(size, dtype=torch.uint8)  # which says how much is missing
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
