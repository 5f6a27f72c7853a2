"""Reading and writing states. A state arrives as the cell that holds its value."""

from __future__ import annotations

from torch import Tensor

from runtimes.mil.ops.table import op


class Cell:
    """What a state holds. What a run gave stays what it was; who keeps ``value`` itself beyond a run takes a copy."""

    __slots__ = ("own", "value")

    def __init__(self, value: Tensor):
        self.value = value
        self.own = 0
        """The memory of a value that was made for this state, and may be written over (``overwrite.py``); 0: none."""


@op(results="input")
def read_state(input: Tensor) -> Tensor:
    """The value when the operation runs: two reads around a write differ."""
    assert isinstance(input, Cell)
    return input.value


@op(results="")
def write_state(input: Tensor, data: Tensor) -> tuple[()]:
    assert isinstance(input, Cell)
    input.value = data
    return ()


@op(results="state")
def coreml_update_state(state: Tensor, value: Tensor) -> Tensor:
    assert isinstance(state, Cell)
    state.value = value
    return value
