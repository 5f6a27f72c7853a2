"""The table of operations: a MIL name -> the function that computes it, and what its arguments are.

A kernel's signature is its declaration. An argument annotated as a tensor, or as a list of tensors, arrives as such;
any other arrives as a plain Python value, whether it is a constant of the program or computed while it runs. One that
MIL gives as several values is annotated as a tuple.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import Tensor

Kind = Literal["tensor", "tensors", "value", "values"]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Parameter:
    """One argument of a kernel."""

    name: str
    kind: Kind
    required: bool


@dataclass(frozen=True)
class Kernel:
    """How one operation is computed."""

    name: str
    function: Callable[..., Any]
    parameters: tuple[Parameter, ...]
    results: tuple[str, ...]
    """Where each result has its element type from: the name of an argument, a dtype, or ``=name`` for an argument that
    holds the name of a dtype."""

    mixed: bool = False
    """Whether float arguments of different types go together."""


KERNELS: dict[str, Kernel] = {}


def op(*names: str, results: str = "x", mixed: bool = False) -> Callable[[F], F]:
    """Enter a function under MIL ``names``, without any under its own."""

    def enter(function: F) -> F:
        parameters = tuple(
            Parameter(p.name, _kind(str(p.annotation)), p.default is inspect.Parameter.empty)
            for p in inspect.signature(function).parameters.values()
        )
        for name in names or (function.__name__.rstrip("_"),):
            assert name not in KERNELS, f"{name} is in the table already"
            KERNELS[name] = Kernel(name, function, parameters, tuple(results.split()), mixed)
        return function

    return enter


def unary(functions: dict[str, Callable[[Tensor], Tensor]]) -> None:
    """Enter functions of one tensor."""
    for name, function in functions.items():

        def apply(x: Tensor, function: Callable[[Tensor], Tensor] = function) -> Tensor:
            return function(x)

        assert name not in KERNELS, f"{name} is in the table already"
        KERNELS[name] = Kernel(name, apply, (Parameter("x", "tensor", True),), ("x",))


def binary(functions: dict[str, Callable[[Tensor, Tensor], Tensor]], results: str = "x") -> None:
    """Enter functions of two tensors."""
    for name, function in functions.items():

        def apply(x: Tensor, y: Tensor, function: Callable[[Tensor, Tensor], Tensor] = function) -> Tensor:
            return function(x, y)

        assert name not in KERNELS, f"{name} is in the table already"
        KERNELS[name] = Kernel(name, apply, tuple(Parameter(a, "tensor", True) for a in "xy"), (results,))


def _kind(annotation: str) -> Kind:
    if "list[Tensor]" in annotation:
        return "tensors"
    if annotation.startswith("tuple["):
        return "values"
    return "tensor" if "Tensor" in annotation else "value"
