"""What a packed format is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from graph.errors import QcError

V = TypeVar("V")

Rows = Callable[[slice], dict[str, Tensor]]
"""Gives the side tensors of some rows of a weight: a weight of the same format."""

Call = tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]
"""An op, its arguments and its keyword arguments."""

CHUNK = 1 << 20
"""Weights worked on at a time: quantizing and comparing take several fp32 copies of what they work on."""

TOGETHER = 16
"""Rows that stay together: an index may stand for the weights of as many."""


class Format(Protocol):
    """One way to hold a weight [out, in] in few bits: integers, and side tensors that scale them.

    ``unpack(pack(w), dtype)`` is the weight that a graph computes with. Both also run on ``meta`` tensors.
    """

    parameters: ClassVar[tuple[str, ...]]
    """The suffixes of the side tensors that can train; the others are buffers."""

    @property
    def name(self) -> str:
        """As figures and texts call it."""
        ...

    def problem(self, name: str, shape: tuple[int, ...]) -> QcError | None:
        """Why the weight ``name`` of this shape cannot be packed; None where it can."""
        ...

    def pack(self, w: Tensor) -> dict[str, Tensor]:
        """Quantize. The keys become the suffixes of the side tensors, the integers first."""
        ...

    def call(self, packed: Mapping[str, V], dtype: torch.dtype) -> Call:
        """The op that unpacks and its arguments; ``packed`` holds tensors or the nodes that read them."""
        ...

    def by_row(self, packed: Mapping[str, Tensor]) -> Rows:
        """The same weight, to be cut row by row, or where ``chunks`` does."""
        ...

    def widest_error(self, w: Tensor, packed: Mapping[str, Tensor], largest: float) -> Tensor:
        """How far unpacking may put each value from rows ``w`` of a weight whose largest magnitude is ``largest``.

        w: [out, in]    packed: the side tensors of these rows  ->  [out, blocks]
        """
        ...


def unpack(form: Format, packed: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The dense weight [out, in] that the integers stand for."""
    op, args, kwargs = form.call(packed, dtype)
    return op(*args, **kwargs)


def has_data(x: Tensor) -> bool:
    """False for ``meta`` and fake tensors: of them only shape and dtype are wanted."""
    return not x.is_meta and not isinstance(x, FakeTensor)


def chunks(w: Tensor) -> Iterator[slice]:
    """The rows of ``w``, in slices of about ``CHUNK`` values, which part no ``TOGETHER`` of them."""
    step = TOGETHER * max(1, CHUNK // max(1, TOGETHER * w.shape[1]))
    return (slice(start, min(start + step, w.shape[0])) for start in range(0, w.shape[0], step))
