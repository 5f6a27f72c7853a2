"""Memory that is given back to the system while large tensors come and go, and memory that is kept for small ones."""

from __future__ import annotations

import ctypes
import math
import sys
import threading

import torch
from torch import Tensor

from graph.pages import room

LENT = 64 << 20
"""Bytes that a thread keeps at most of what it read."""


def release_freed() -> None:
    """Return the pages of freed tensors to the system.

    glibc keeps them for as long as a tensor that stays lies above them. Packing 190 M weights one at a time, 93 MB in
    the end, took 865 MB so, and takes 140 MB with this. Other C libraries are left to themselves.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


class _Kept(threading.local):
    """What each thread keeps."""

    def __init__(self) -> None:
        self.rooms: dict[str, Tensor] = {}


_KEPT = _Kept()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor to write to, which lasts until the same thread asks for that name again.

    On the CPU it is the same memory each time: fresh pages cost several times what is computed in half a megabyte.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size = math.prod(shape)
    kept = _KEPT.rooms.get(name)
    if kept is None or kept.numel() < size or kept.dtype != dtype:
        with torch.inference_mode(False):  # memory made in that mode could not be written to outside it
            kept = _KEPT.rooms[name] = torch.empty(size, dtype=dtype)
    return kept[:size].view(shape)


def lent(size: int) -> Tensor:
    """Bytes on the CPU to read to, for what is looked at and dropped: they last until the same thread asks again.

    As with ``scratch`` they are the same each time, if there are not too many of them.
    """
    if size > LENT:
        return room(size)
    return scratch("lent", (size,), torch.uint8, torch.device("cpu"))
