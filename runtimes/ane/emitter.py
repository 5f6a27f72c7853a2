"""What a lowering writes to: a few words that every backend of this kind has, under the names that MIL gives its ops.

``runtimes.ane.mil`` writes Core ML packages. Another format is another class with these methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Var(Protocol):
    """A value of the program being written."""

    @property
    def shape(self) -> tuple[int, ...]: ...


class Emitter(Protocol):
    """One function of a program while it is written."""

    def at(self, site: str) -> None:
        """The ops that follow are named after this site of the graph."""

    def input(self, name: str) -> Var:
        """An input that the function was declared with, or what a state of that name holds at the start.

        Of a state this may be asked once: later values come from ``update_state``.
        """
        ...

    def constant(self, value: Array) -> Var:
        """A stored tensor, in the dtype of ``value``."""
        ...

    def lut_weight(self, indices: Array, levels: Array, bits: int) -> Var:
        """A stored weight: u8 indices [out, in, 1, 1], of so many bits in the file, into fp16 levels [groups, N].

        ``out / groups`` rows share their levels.
        """
        ...

    def vector_weight(self, indices: Array, table: Array, bits: int) -> Var:
        """A stored weight: u8 indices [out / V, in, …], of so many bits in the file, into fp16 vectors [N, V]."""
        ...

    def int8_weight(self, values: Array, scale: Array) -> Var:
        """A stored weight: i8 [out, in, …] times an fp16 scale a row [out, 1, …]."""
        ...

    def op(self, kind: str, **inputs: Any) -> Var:
        """An op: ``op("conv", x=…, weight=…)``. Plain numbers and arrays become constants."""
        ...

    def update_state(self, name: str, value: Var) -> Var:
        """Store ``value`` in a state; what it holds from now on."""
        ...

    def outputs(self, values: Sequence[tuple[str, Var]]) -> None:
        """End the function: what it returns, by name."""
        ...


def half(value: float) -> np.float16:
    """A number in the dtype of all activations."""
    return np.float16(value)
