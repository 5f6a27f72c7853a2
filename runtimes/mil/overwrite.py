"""Writing into a state without a copy of all of it.

``slice_update`` gives a new tensor. Of a cache that is read, changed in a row and written again, the old one is of no
use to anybody; so the row is written where it belongs. Two things have to hold. By names, known when a function is made
ready: the value is what the state holds, no later operation reads it, and the result is what is written next. By
memory, known when it runs: nothing else that is still in use looks into it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from runtimes.mil.ops.state import Cell
from runtimes.mil.program import Named, Operation


class Planned(Protocol):
    """A step of a function."""

    operation: Operation
    drops: tuple[str, ...]
    overwrites: str | None


def plan_overwrites(steps: Sequence[Planned]) -> None:
    """Mark every update of a state's value that the state itself takes next."""
    held: dict[str, str] = {}
    """Name of a value -> the state that holds it now."""

    for number, step in enumerate(steps):
        operation = step.operation
        if operation.type == "read_state":
            held[operation.outputs[0].name] = _named(operation, "input")
        elif operation.type in ("write_state", "coreml_update_state"):
            state = _named(operation, "input" if operation.type == "write_state" else "state")
            held = {name: of for name, of in held.items() if of != state}
            if operation.type == "coreml_update_state":
                held[operation.outputs[0].name] = state
        elif operation.type == "slice_update":
            given = _named(operation, "x")
            if given in held and given in step.drops and _taken_next(steps[number:], held[given]):
                step.overwrites = held[given]


def _taken_next(steps: Sequence[Planned], state: str) -> bool:
    """Whether the next use of a state is that the result of the first step is written to it."""
    made = steps[0].operation.outputs[0].name
    for step in steps[1:]:
        operation = step.operation
        if operation.type == "read_state" and _named(operation, "input") == state:
            return False
        if operation.type == "write_state" and _named(operation, "input") == state:
            return _named(operation, "data") == made
        if operation.type == "coreml_update_state" and _named(operation, "state") == state:
            return _named(operation, "value") == made
    return False


def _named(operation: Operation, argument: str) -> str:
    bindings = operation.inputs.get(argument, ())
    return bindings[0].name if len(bindings) == 1 and isinstance(bindings[0], Named) else ""


def alone(x: Tensor, cell: Cell, values: Mapping[str, Any], name: str) -> bool:
    """Whether the memory of ``x``, known as ``name``, was made for this state and nothing else in use looks into it."""
    memory = memory_of(x)
    if memory != cell.own:
        return False
    return not any(key != name and isinstance(v, Tensor) and memory_of(v) == memory for key, v in values.items())


def memory_of(value: Tensor) -> int:
    """Where its elements lie; views of one tensor share it."""
    return value.untyped_storage().data_ptr()


def release(cells: Mapping[str, Cell], given: Sequence[Tensor]) -> None:
    """What a caller was given is not written over."""
    seen = {memory_of(value) for value in given}
    for cell in cells.values():
        if cell.own in seen:
            cell.own = 0
