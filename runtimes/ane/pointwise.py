"""Activations and arithmetic of values with values, stored tensors and numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from torch import fx

from graph.ops import op_name
from graph.sites import is_constant
from runtimes.ane.attention import masked
from runtimes.ane.emitter import Var, half
from runtimes.ane.layout import refuse
from runtimes.ane.lowering import Lowering, Result, Split, Value, lowers

_ARITHMETIC = {"aten.add": "add", "aten.sub": "sub", "aten.mul": "mul", "aten.div": "real_div"}


def each(low: Lowering, source: Any, function: Callable[[Var], Var]) -> Result:
    """Apply a function to a value, or to each of its pieces."""
    found = low.results[source]
    if isinstance(found, Split):
        return Split(tuple(replace(piece, var=function(piece.var)) for piece in found.values))
    return replace(found, var=function(found.var))


@lowers("aten.silu")
def silu(low: Lowering, node: fx.Node) -> Result:
    """``x/2 (1 + tanh(x/2))``: the engine's own silu is off by a thousandth near 0 (rule N4)."""
    emit = low.emit

    def form(x: Var) -> Var:
        h = emit.op("mul", x=x, y=half(0.5))
        return emit.op("mul", x=h, y=emit.op("add", x=emit.op("tanh", x=h), y=half(1)))

    return each(low, node.args[0], form)


@lowers("aten.gelu")
def gelu(low: Lowering, node: fx.Node) -> Result:
    """Exact, or the tanh approximation."""
    approximate = node.kwargs.get("approximate", node.args[1] if len(node.args) > 1 else "none")
    mode = "TANH_APPROXIMATION" if approximate == "tanh" else "EXACT"
    return each(low, node.args[0], lambda x: low.emit.op("gelu", x=x, mode=mode))


@lowers("aten.relu", "aten.tanh", "aten.sigmoid", "aten.erf")
def unary(low: Lowering, node: fx.Node) -> Result:
    """What MIL has under the same name."""
    kind = op_name(node.target).removeprefix("aten.")
    return each(low, node.args[0], lambda x: low.emit.op(kind, x=x))


@lowers("aten.square", "aten.pow.Tensor_Scalar")
def power(low: Lowering, node: fx.Node) -> Result:
    """``x x``, and ``x x x``: of a squared relu, or of an activation that is spelled out."""
    exponent = 2 if op_name(node.target) == "aten.square" else node.args[1]
    if exponent not in (2, 3):
        raise refuse(node, f"raises to the power {exponent}")

    def form(x: Var) -> Var:
        square = low.emit.op("mul", x=x, y=x)
        return square if exponent == 2 else low.emit.op("mul", x=square, y=x)

    return each(low, node.args[0], form)


@lowers("aten.neg")
def negative(low: Lowering, node: fx.Node) -> Result:
    """Times -1."""
    return each(low, node.args[0], lambda x: low.emit.op("mul", x=x, y=half(-1)))


@lowers(*(f"{op}.{other}" for op in _ARITHMETIC for other in ("Tensor", "Scalar")))
def arithmetic(low: Lowering, node: fx.Node) -> Result:
    """``a + b`` and so on, where at least one is a value."""
    kind = _ARITHMETIC[op_name(node.target).rpartition(".")[0]]
    a, b = node.args[:2]
    if node.kwargs.get("alpha", 1) != 1:
        raise refuse(node, "scales what it adds")
    for value, mask in ((a, b), (b, a)):
        if kind == "add" and (mask in low.options.masks or mask in low.options.biases):
            return replace(low.value(value), var=masked(low, low.value(value).var, mask))
    if not _is_value(low, a) or not _is_value(low, b):
        return _with_constant(low, node, kind, a, b)
    left, right = low.value(a), low.value(b)
    if left.features == right.features and tuple(left.var.shape)[:-1] == tuple(right.var.shape)[:-1]:  # or one for all
        return Value(low.emit.op(kind, x=left.var, y=right.var), left.features)
    if left.features == right.features and len(left.features) > 1:
        return Value(low.emit.op(kind, x=low.heads(left), y=low.heads(right)), left.features)
    if left.features[-1] == right.features[-1] and 1 in (_heads(left), _heads(right)):
        most = max(left.features, right.features, key=math.prod)
        return Value(low.emit.op(kind, x=low.heads(left), y=low.heads(right)), most)
    if math.prod(left.features) != math.prod(right.features):
        raise refuse(node, f"broadcasts {list(left.features)} with {list(right.features)}")
    return Value(low.emit.op(kind, x=low.channels(left), y=low.channels(right)), left.features)


def _heads(value: Value) -> int:
    return math.prod(value.features[:-1])


def _with_constant(low: Lowering, node: fx.Node, kind: str, a: Any, b: Any) -> Result:
    value, other = (a, b) if _is_value(low, a) else (b, a)
    found = low.results[value]

    def form(piece: Value) -> Value:
        var, constant = (low.natural(piece)[0], _operand(low, node, other, piece.features))
        if kind == "real_div" and value is a and np.ndim(constant) == 0:
            return replace(piece, var=low.emit.op("mul", x=var, y=half(1 / float(constant))))
        x, y = (var, constant) if value is a else (constant, var)
        return replace(piece, var=low.emit.op(kind, x=x, y=y))

    if isinstance(found, Split):
        if isinstance(other, fx.Node):
            raise refuse(node, "changes logits by a stored tensor")
        return Split(tuple(form(piece) for piece in found.values))
    return form(found)


def _operand(low: Lowering, node: fx.Node, other: Any, features: tuple[int, ...]) -> Any:
    if isinstance(other, (int, float)):
        if abs(other) > 65504:
            raise refuse(node, f"computes with {other:g}, beyond the 65504 of fp16")
        return half(other)
    assert isinstance(other, fx.Node) and is_constant(other)
    found = low.constant_operand(other, features)
    return half(float(found.reshape(-1)[0])) if found.size == 1 else found


def _is_value(low: Lowering, argument: Any) -> bool:
    return isinstance(argument, fx.Node) and argument in low.results
