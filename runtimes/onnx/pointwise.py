"""Ops on every number by itself."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from graph.ops import op_name
from runtimes.onnx.lowering import Lowering, Result, dtype_of, given, lowers, tensor_of, type_of, unlowered

_ARITHMETIC = {
    "aten.add.Tensor": "Add", "aten.add.Scalar": "Add", "aten.sub.Tensor": "Sub", "aten.sub.Scalar": "Sub",
    "aten.mul.Tensor": "Mul", "aten.mul.Scalar": "Mul", "aten.div.Tensor": "Div", "aten.div.Scalar": "Div",
    "aten.maximum": "Max", "aten.minimum": "Min", "aten.max.other": "Max", "aten.min.other": "Min",
}  # fmt: skip
_ORDER = {
    "aten.eq": "Equal", "aten.lt": "Less", "aten.le": "LessOrEqual", "aten.gt": "Greater", "aten.ge": "GreaterOrEqual",
}  # fmt: skip
_PLAIN = {
    "aten.relu": "Relu", "aten.tanh": "Tanh", "aten.sigmoid": "Sigmoid", "aten.cos": "Cos", "aten.sin": "Sin",
    "aten.exp": "Exp", "aten.log": "Log", "aten.sqrt": "Sqrt", "aten.abs": "Abs", "aten.neg": "Neg",
    "aten.reciprocal": "Reciprocal", "aten.erf": "Erf", "aten.floor": "Floor", "aten.ceil": "Ceil", "aten.sign": "Sign",
    "aten.round": "Round", "aten.mish": "Mish", "aten.hardswish": "HardSwish",
}  # fmt: skip
_NUMBERS = {"py.add": "Add", "py.sub": "Sub", "py.mul": "Mul", "py.sym_max": "Max", "py.sym_min": "Min"}


@lowers(*_ARITHMETIC)
def arithmetic(low: Lowering, node: fx.Node) -> Result:
    """Both operands in the dtype of the result; ``alpha`` multiplies the second."""
    dtype = dtype_of(node)
    other = low.operand(node.args[1], dtype)
    alpha = given(node, 2, "alpha", 1) if op_name(node.target).startswith(("aten.add", "aten.sub")) else 1
    if alpha != 1:
        other = low.op("Mul", other, low.operand(alpha, dtype))
    return low.op(_ARITHMETIC[op_name(node.target)], low.operand(node.args[0], dtype), other)


@lowers("aten.rsub.Scalar", "aten.rsub.Tensor")
def reversed_difference(low: Lowering, node: fx.Node) -> Result:
    """The second less the first."""
    dtype = dtype_of(node)
    return low.op("Sub", low.operand(node.args[1], dtype), low.operand(node.args[0], dtype))


@lowers(*(f"{op}.{kind}" for op in (*_ORDER, "aten.ne") for kind in ("Scalar", "Tensor")))
def comparison(low: Lowering, node: fx.Node) -> Result:
    """Both operands in the wider dtype of the two."""
    x, y = node.args[:2]
    assert isinstance(x, fx.Node)
    dtype = _common(x, y)
    op = op_name(node.target).rpartition(".")[0]
    a, b = low.operand(x, dtype), low.operand(y, dtype)
    return low.op("Not", low.op("Equal", a, b)) if op == "aten.ne" else low.op(_ORDER[op], a, b)


def _common(x: fx.Node, y: Any) -> torch.dtype:
    """The dtype in which two operands are compared."""
    value = tensor_of(x)
    if not isinstance(y, fx.Node):
        return torch.result_type(value, y)
    other = y.meta["val"]
    return torch.result_type(value, other if isinstance(other, torch.Tensor) else 1)


@lowers(*_PLAIN)
def plain(low: Lowering, node: fx.Node) -> Result:
    """Ops that ONNX has."""
    dtype = dtype_of(node)
    return low.op(_PLAIN[op_name(node.target)], low.operand(node.args[0], dtype))


@lowers("aten.silu")
def silu(low: Lowering, node: fx.Node) -> Result:
    """``x sigmoid(x)``."""
    x = low.value(node.args[0])
    return low.op("Mul", x, low.op("Sigmoid", x))


@lowers("aten.gelu")
def gelu(low: Lowering, node: fx.Node) -> Result:
    """Exact, or over tanh."""
    return low.op("Gelu", low.value(node.args[0]), approximate=given(node, 1, "approximate", "none"))


@lowers("aten.elu")
def elu(low: Lowering, node: fx.Node) -> Result:
    """With scale and input scale of 1, all that models use."""
    if any(arg != 1 for arg in node.args[2:]):
        raise unlowered(node, "with scales")
    return low.op("Elu", low.value(node.args[0]), alpha=float(given(node, 1, "alpha", 1.0)))


@lowers("aten.leaky_relu")
def leaky_relu(low: Lowering, node: fx.Node) -> Result:
    """Below zero ``slope x``."""
    return low.op("LeakyRelu", low.value(node.args[0]), alpha=float(given(node, 1, "negative_slope", 0.01)))


@lowers("aten.softplus")
def softplus(low: Lowering, node: fx.Node) -> Result:
    """``log(1 + exp(beta x)) / beta``; beyond a threshold torch returns x, which that is in fp32."""
    beta, dtype = float(given(node, 1, "beta", 1.0)), dtype_of(node)
    x = low.value(node.args[0])
    if beta == 1:
        return low.op("Softplus", x)
    return low.op("Div", low.op("Softplus", low.op("Mul", x, low.number(beta, dtype))), low.number(beta, dtype))


@lowers("aten.relu6", "aten.hardtanh", "aten.clamp", "aten.clamp_min", "aten.clamp_max")
def clamp(low: Lowering, node: fx.Node) -> Result:
    """Between two numbers, either of which may be missing."""
    op, dtype = op_name(node.target), dtype_of(node)
    if op == "aten.relu6":
        least, most = 0, 6
    elif op == "aten.hardtanh":
        least, most = given(node, 1, "min_val", -1.0), given(node, 2, "max_val", 1.0)
    else:
        least = given(node, 1, "min") if op != "aten.clamp_max" else None
        most = given(node, 1 if op == "aten.clamp_max" else 2, "max") if op != "aten.clamp_min" else None
    x = low.operand(node.args[0], dtype)
    ends = ["" if end is None else low.operand(end, dtype) for end in (least, most)]
    return low.op("Clip", x, *ends)


@lowers("aten.pow.Tensor_Scalar", "aten.pow.Tensor_Tensor", "aten.square")
def power(low: Lowering, node: fx.Node) -> Result:
    """A square is a product, which rounds as torch does."""
    dtype = dtype_of(node)
    exponent: Any = 2 if op_name(node.target) == "aten.square" else node.args[1]
    x = low.operand(node.args[0], dtype)
    if exponent == 2:
        return low.op("Mul", x, x)
    return low.op("Sqrt", x) if exponent == 0.5 else low.op("Pow", x, low.operand(exponent, dtype))


@lowers("aten.pow.Scalar")
def power_of_number(low: Lowering, node: fx.Node) -> Result:
    """A number to the power of every value."""
    dtype = dtype_of(node)
    return low.op("Pow", *(low.operand(arg, dtype) for arg in node.args[:2]))


@lowers("aten.expm1")
def expm1(low: Lowering, node: fx.Node) -> Result:
    """``exp(x) - 1``."""
    dtype = dtype_of(node)
    return low.op("Sub", low.op("Exp", low.operand(node.args[0], dtype)), low.number(1, dtype))


@lowers("aten.rsqrt")
def rsqrt(low: Lowering, node: fx.Node) -> Result:
    """``1 / sqrt(x)``."""
    return low.op("Reciprocal", low.op("Sqrt", low.operand(node.args[0], dtype_of(node))))


@lowers("aten.div.Tensor_mode", "aten.floor_divide")
def division(low: Lowering, node: fx.Node) -> Result:
    """Rounded down, or towards zero. ONNX divides integers towards zero, so they go over fp64 where that matters."""
    dtype, mode = dtype_of(node), given(node, 2, "rounding_mode", "floor")
    if op_name(node.target) != "aten.floor_divide" and mode is None:
        return low.op("Div", low.operand(node.args[0], dtype), low.operand(node.args[1], dtype))
    if dtype.is_floating_point:
        found = low.op("Div", low.operand(node.args[0], dtype), low.operand(node.args[1], dtype))
        return (
            low.op("Floor", found)
            if mode == "floor"
            else low.op("Mul", low.op("Sign", found), low.op("Floor", low.op("Abs", found)))
        )
    if mode == "trunc":
        return low.op("Div", low.operand(node.args[0], dtype), low.operand(node.args[1], dtype))
    exact = low.op("Div", low.operand(node.args[0], torch.float64), low.operand(node.args[1], torch.float64))
    return low.cast(low.op("Floor", exact), torch.float64, dtype)


@lowers("aten.remainder.Scalar", "aten.remainder.Tensor")
def remainder(low: Lowering, node: fx.Node) -> Result:
    """With the sign of the divisor, as integers have it in ONNX."""
    dtype = dtype_of(node)
    if dtype.is_floating_point:
        raise unlowered(node, "of floats")
    return low.op("Mod", low.operand(node.args[0], dtype), low.operand(node.args[1], dtype))


@lowers("aten.to.dtype", "qc.cast_like", "aten.type_as")
def to(low: Lowering, node: fx.Node) -> Result:
    """A cast; everything but zero is true."""
    source, wanted = node.args[0], dtype_of(node)
    assert isinstance(source, fx.Node)
    type_of(wanted)
    return low.cast(low.value(source), dtype_of(source), wanted)


@lowers("qc.ste_fp16")
def through_fp16(low: Lowering, node: fx.Node) -> Result:
    """Rounded to fp16, in the dtype it had."""
    dtype = dtype_of(node)
    return low.cast(low.cast(low.value(node.args[0]), dtype, torch.float16), torch.float16, dtype)


@lowers("aten.clone", "aten.contiguous", "aten.dropout", "aten.alias", "aten.detach")
def same(low: Lowering, node: fx.Node) -> Result:
    """Nothing: exports do not train, and memory is the runtime's."""
    return low.value(node.args[0])


@lowers("qc.dropout")
def dropout(low: Lowering, node: fx.Node) -> Result:
    """Nothing, as long as ``training`` is left out."""
    return low.value(node.args[0])


@lowers(
    "aten.logical_and",
    "aten.logical_or",
    "aten.bitwise_and.Tensor",
    "aten.bitwise_or.Tensor",
    "aten.__and__.Tensor",
    "aten.__or__.Tensor",
)
def logic(low: Lowering, node: fx.Node) -> Result:
    """Of booleans."""
    kind = "And" if "and" in op_name(node.target) else "Or"
    return low.op(kind, *(low.operand(arg, torch.bool) for arg in node.args[:2]))


@lowers("aten.logical_not", "aten.bitwise_not")
def negation(low: Lowering, node: fx.Node) -> Result:
    """Of booleans."""
    return low.op("Not", low.operand(node.args[0], torch.bool))


@lowers("aten.where.self", "aten.where.ScalarOther", "aten.where.ScalarSelf", "aten.where.Scalar")
def where(low: Lowering, node: fx.Node) -> Result:
    """The one or the other."""
    dtype = dtype_of(node)
    return low.op("Where", low.value(node.args[0]), *(low.operand(arg, dtype) for arg in node.args[1:3]))


@lowers("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
def masked_fill(low: Lowering, node: fx.Node) -> Result:
    """A number where the mask is true."""
    dtype = dtype_of(node)
    value, mask, fill = node.args[:3]
    if not isinstance(fill, fx.Node) and not math.isfinite(float(fill)):  # type: ignore[arg-type]
        fill = math.copysign(torch.finfo(dtype).max, float(fill))  # type: ignore[arg-type]
    return low.op("Where", low.value(mask), low.operand(fill, dtype), low.operand(value, dtype))


@lowers(*_NUMBERS)
def of_sizes(low: Lowering, node: fx.Node) -> Result:
    """Arithmetic of numbers that move with batch or length."""
    return low.op(_NUMBERS[op_name(node.target)], *(low.operand(arg, torch.int64) for arg in node.args))


@lowers("py.floordiv")
def size_over(low: Lowering, node: fx.Node) -> Result:
    """Sizes are not negative, so that rounding to zero is rounding down."""
    return low.op("Div", *(low.operand(arg, torch.int64) for arg in node.args))


@lowers("py.neg")
def negative(low: Lowering, node: fx.Node) -> Result:
    """Less than nothing."""
    return low.op("Neg", low.operand(node.args[0], torch.int64))
