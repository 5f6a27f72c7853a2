"""Lowering: the ops of a graph, one after the other, through the table op -> function.

A value of the graph is a value of the same shape and dtype in the model. A number that moves with batch or length is
an int64 of one element. What depends on stored tensors alone is computed when the file is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from graph import Graph, QcError
from graph.formats.stored import DEQUANTIZE
from graph.ops import op_name
from graph.probe import evaluate_constant
from graph.shapes import dims_of
from graph.sites import node_name
from runtimes.emitters import Emitters
from runtimes.onnx.program import TYPES, Program, plain

Result = str | tuple[str, ...]


@dataclass
class Lowering:
    """A graph becoming a model."""

    graph: Graph
    program: Program = field(default_factory=Program)
    results: dict[fx.Node, Result] = field(default_factory=dict)
    straight: frozenset[str] = frozenset()
    """Weights that not only linears read: they lie as the graph has them, [out, in]."""

    constants: dict[fx.Node, bool] = field(default_factory=dict)
    """What depends on stored tensors alone -> whether one of these is packed."""

    site: str = ""

    def __post_init__(self) -> None:
        for node in self.graph.module.graph.nodes:
            inputs = node.all_input_nodes
            if node.op == "get_attr":
                self.constants[node] = False
            elif node.op == "call_function" and inputs and all(n in self.constants for n in inputs):
                self.constants[node] = op_name(node.target) in DEQUANTIZE or any(self.constants[n] for n in inputs)

    def run(self, nodes: Sequence[fx.Node]) -> list[QcError]:
        """Lower ops in their order; what of them cannot be lowered."""
        errors = []
        for node in nodes:
            self.site = node_name(node)
            try:
                self.results[node] = TABLE[op_name(node.target)](self, node)
            except QcError as error:
                errors.append(error)
                self.results[node] = self.site  # so that the others are looked at too
        return errors

    # -- writing ops ------------------------------------------------------------------------------------------------

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Append a node with one result."""
        return self.program.add(self.site, kind, inputs, **attributes)[0]

    def several(self, kind: str, *inputs: str, results: int, **attributes: Any) -> tuple[str, ...]:
        """Append a node with several results."""
        return tuple(self.program.add(self.site, kind, inputs, results, **attributes))

    def numbers(self, *values: int) -> str:
        """An int64 vector, which axes, shapes and slices are."""
        return self.program.constant(np.array(values, dtype=np.int64))

    def number(self, value: float, dtype: torch.dtype) -> str:
        """A number of that dtype."""
        return self.program.constant(torch.tensor(value, dtype=dtype).numpy())

    def cast(self, value: str, dtype: torch.dtype, to: torch.dtype) -> str:
        """``value`` of ``dtype`` in another one."""
        return value if dtype is to else self.op("Cast", value, to=type_of(to))

    def reshape(self, value: str, shape: Sequence[int | str]) -> str:
        """``value`` in another shape; sizes that are no numbers are values."""
        return self.op("Reshape", value, self.sizes(shape))

    def transpose(self, value: str, order: Sequence[int]) -> str:
        """``value`` with its axes in another order."""
        return self.op("Transpose", value, perm=list(order))

    def slice(self, value: str, axis: int, start: int | str, end: int | str, step: int = 1) -> str:
        """Some of ``value`` along an axis; ends that are no numbers are values."""
        start, end = (self.numbers(at) if isinstance(at, int) else at for at in (start, end))
        more = [self.numbers(step)] if step != 1 else []
        return self.op("Slice", value, start, end, self.numbers(axis), *more)

    def size(self, value: str, axis: int) -> str:
        """How long a value is along an axis."""
        return self.op("Shape", value, start=axis, end=axis + 1)

    def sizes(self, shape: Sequence[int | str]) -> str:
        """A shape; sizes that are no numbers are values."""
        if all(isinstance(size, int) for size in shape):
            return self.numbers(*(int(size) for size in shape))
        pieces = [self.numbers(size) if isinstance(size, int) else size for size in shape]
        return pieces[0] if len(pieces) == 1 else self.op("Concat", *pieces, axis=0)

    # -- reading the graph ------------------------------------------------------------------------------------------

    def value(self, node: Any) -> str:
        """The one value of a node."""
        assert isinstance(node, fx.Node), f"{node!r} is no value"
        if node not in self.results:
            self.results[node] = self.stored(node) if self.is_stored(node) else self._unpacked(node)
        found = self.results[node]
        assert isinstance(found, str), f"{node_name(node)} has several values"
        return found

    def is_stored(self, node: fx.Node) -> bool:
        """Whether a value depends on stored tensors alone, none of which is packed."""
        return not self.constants.get(node, True)

    def evaluate(self, node: fx.Node) -> Tensor:
        """The value of such a node, computed when the file is written."""
        return evaluate_constant(self.graph, node)

    def stored(self, node: fx.Node) -> str:
        """A value that is computed when the file is written."""
        value, name = tensor_of(node), node_name(node)
        return self.program.hold(
            name, type_of(value.dtype), tuple(value.shape), lambda: plain(self.evaluate(node), name)
        )

    def _unpacked(self, node: fx.Node) -> Result:
        """A value that depends on packed weights: the model computes it."""
        assert node in self.constants, f"{node_name(node)} comes later"
        before, self.site = self.site, node_name(node)
        found = TABLE[op_name(node.target)](self, node)
        self.site = before
        return found

    def operand(self, arg: Any, dtype: torch.dtype) -> str:
        """A value, or a number, in a dtype."""
        if isinstance(arg, fx.Node):
            return self.cast(self.value(arg), dtype_of(arg), dtype)
        return self.number(arg, dtype)

    def whole(self, arg: Any) -> int | str:
        """A size, an end of a slice: a number, or a value."""
        return self.value(arg) if isinstance(arg, fx.Node) else int(arg)


Lower = Callable[[Lowering, fx.Node], Result]

TABLE: Emitters[Lower] = Emitters()
"""Op of the graph -> the function that emits it."""

lowers = TABLE.lowers


def unlowered(node: fx.Node, why: str) -> QcError:
    """The error of an op that has a lowering, but not with these arguments."""
    what = f"onnx has no lowering for {op_name(node.target)} {why}"
    return QcError(what, site=node_name(node), fix=FIX)


FIX = "add one in runtimes/onnx, or rewrite the op away with an earlier pass"


def given(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of an op, by its position or its name."""
    return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)


def tensor_of(node: fx.Node) -> Tensor:
    """A stand-in for the tensor that a node returns."""
    value = node.meta["val"]
    assert isinstance(value, Tensor), f"{node_name(node)} is no tensor"
    return value


def dtype_of(node: fx.Node) -> torch.dtype:
    """The dtype of a node; numbers that move with batch or length are int64."""
    value = node.meta["val"]
    return value.dtype if isinstance(value, Tensor) else torch.int64


def rank_of(node: fx.Node) -> int:
    """How many axes a node has."""
    return tensor_of(node).dim()


def axis_of(node: fx.Node, axis: int) -> int:
    """An axis counted from the first."""
    return axis % max(1, rank_of(node))


def fixed(node: fx.Node, axis: int) -> int | None:
    """The size of a node along an axis, if it is a number."""
    size = dims_of(node)[axis]
    return int(size) if size.isdigit() else None


def type_of(dtype: torch.dtype) -> str:
    """The type of ONNX with the values of ``dtype``; a QcError where ONNX Runtime computes with none such."""
    if dtype not in TYPES:
        what = f"ONNX Runtime does not compute in {str(dtype).removeprefix('torch.')}"
        raise QcError(what, fix="set dtype to fp32 or fp16")
    return TYPES[dtype]
