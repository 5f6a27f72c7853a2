"""A saved program as plain values: functions, operations, types. Nothing of protobuf goes further than this file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from graph.errors import QcError
from runtimes.mil.types import BY_PROTO, TensorType


@dataclass(frozen=True)
class Immediate:
    """A constant that stands in the program itself."""

    type: TensorType
    value: Tensor | str | tuple[str, ...]


@dataclass(frozen=True)
class Stored:
    """A constant in a file of weights."""

    type: TensorType
    path: Path
    offset: int


@dataclass(frozen=True)
class Named:
    """The result of another operation, or an input of the function."""

    name: str


Binding: TypeAlias = Immediate | Stored | Named


@dataclass(frozen=True)
class Variable:
    """A name with its declared type."""

    name: str
    type: TensorType


@dataclass(frozen=True)
class Operation:
    """One line of a program."""

    type: str
    inputs: Mapping[str, tuple[Binding, ...]]
    outputs: tuple[Variable, ...]
    attributes: Mapping[str, Binding]
    blocks: int = 0
    """Nested blocks: only of control flow."""

    @property
    def name(self) -> str:
        """The name of its first result."""
        return self.outputs[0].name if self.outputs else self.type

    @property
    def arguments(self) -> dict[str, tuple[Binding, ...]]:
        """Inputs, and the attributes that old opsets use for them."""
        given = {key: (value,) for key, value in self.attributes.items() if key not in ("name", "val")}
        return given | dict(self.inputs)


@dataclass(frozen=True)
class Function:
    """What a package can be asked to compute."""

    name: str
    opset: str
    inputs: tuple[Variable, ...]
    states: tuple[Variable, ...]
    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]
    declared: Mapping[str, TensorType] = field(default_factory=dict)
    """Inputs, states and outputs as the model's description has them: what an app sees."""

    def types(self) -> dict[str, TensorType]:
        """The declared type of every name."""
        known = {v.name: v.type for v in (*self.inputs, *self.states)}
        for operation in self.operations:
            known |= {v.name: v.type for v in operation.outputs}
        return known


def tensor_type(given: Any, where: str) -> TensorType:
    """A ``ValueType`` of the proto -> ours. A state counts as what it holds."""
    which = given.WhichOneof("type")
    if which == "stateType":
        return tensor_type(given.stateType.wrappedType, where)
    if which == "listType":
        return tensor_type(given.listType.type, where)
    if which != "tensorType":
        raise QcError(f"{where} is of the kind {which}, which is not read", fix="use tensors and states alone")
    dtype = BY_PROTO.get(given.tensorType.dataType)
    if dtype is None:
        raise QcError(f"{where} has the unknown element type {given.tensorType.dataType}", fix="export it again")
    shape = tuple(
        int(d.constant.size) if d.WhichOneof("dimension") == "constant" else None for d in given.tensorType.dimensions
    )
    if len(shape) != given.tensorType.rank:
        raise QcError(f"{where} has {len(shape)} lengths and the rank {given.tensorType.rank}", fix="export it again")
    return TensorType(dtype, shape)
