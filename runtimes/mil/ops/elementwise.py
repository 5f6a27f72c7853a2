"""Operations on one element at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from runtimes.mil.ops.table import binary, op, unary
from runtimes.mil.types import DTYPES

unary(
    {
        "abs": torch.abs, "acos": torch.acos, "asin": torch.asin, "atan": torch.atan, "atanh": torch.atanh,
        "ceil": torch.ceil, "cos": torch.cos, "cosh": torch.cosh, "erf": torch.erf, "exp": torch.exp,
        "exp2": lambda x: torch.exp2(x.float()).to(x.dtype), "floor": torch.floor, "identity": lambda x: x,
        "logical_not": torch.logical_not, "relu": torch.relu, "relu6": F.relu6, "round": torch.round,
        "sigmoid": torch.sigmoid, "sign": torch.sign, "silu": F.silu, "sin": torch.sin, "sinh": torch.sinh,
        "softplus": lambda x: torch.relu(x) + torch.log1p(torch.exp(-x.abs())), "softsign": F.softsign,
        "sqrt": torch.sqrt, "square": torch.square, "tan": torch.tan, "tanh": torch.tanh,
    }
)  # fmt: skip


def _divide(x: Tensor, y: Tensor) -> Tensor:
    return (x / y).to(x.dtype)


binary(
    {
        "add": torch.add, "sub": torch.sub, "mul": torch.mul, "real_div": _divide, "maximum": torch.maximum,
        "minimum": torch.minimum, "mod": torch.remainder, "pow": torch.pow,
        "floor_div": lambda x, y: torch.div(x, y, rounding_mode="floor"),
    }
)  # fmt: skip
binary(
    {
        "equal": torch.eq, "not_equal": torch.ne, "greater": torch.gt, "greater_equal": torch.ge, "less": torch.lt,
        "less_equal": torch.le, "logical_and": torch.logical_and, "logical_or": torch.logical_or,
        "logical_xor": torch.logical_xor,
    },
    "bool",
)  # fmt: skip


@op()
def log(x: Tensor, epsilon: float = 1e-45) -> Tensor:
    return torch.log(x + epsilon)


@op()
def rsqrt(x: Tensor, epsilon: float = 1e-12) -> Tensor:
    return torch.rsqrt(x + epsilon)


@op()
def inverse(x: Tensor, epsilon: float = 1e-4) -> Tensor:
    return torch.reciprocal(x + epsilon)


@op()
def clip(x: Tensor, alpha: float = -torch.inf, beta: float = torch.inf) -> Tensor:
    return x.clamp(alpha, beta)


@op()
def threshold(x: Tensor, alpha: float) -> Tensor:
    return x.clamp(min=alpha)


@op()
def clamped_relu(x: Tensor, alpha: float, beta: float) -> Tensor:
    return torch.where(x >= 0, x, alpha * x).clamp(max=beta)


@op()
def elu(x: Tensor, alpha: float) -> Tensor:
    return F.elu(x, alpha)


_GELU: dict[str, Callable[[Tensor], Tensor]] = {
    "EXACT": F.gelu,
    "TANH_APPROXIMATION": lambda x: F.gelu(x, approximate="tanh"),
    "SIGMOID_APPROXIMATION": lambda x: x * torch.sigmoid(1.702 * x),
}


@op()
def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    return _GELU[mode](x)


@op()
def leaky_relu(x: Tensor, alpha: float = 0.01) -> Tensor:
    return F.leaky_relu(x, alpha)


@op()
def linear_activation(x: Tensor, alpha: float, beta: float = 0.0) -> Tensor:
    return alpha * x + beta


@op()
def prelu(x: Tensor, alpha: Tensor) -> Tensor:
    return F.prelu(x, alpha)


@op()
def scaled_tanh(x: Tensor, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    return alpha * torch.tanh(beta * x)


@op()
def sigmoid_hard(x: Tensor, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    return (alpha * x + beta).clamp(0, 1)


@op()
def softplus_parametric(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Give alpha log(1 + exp(beta x)), with one alpha and beta a channel: axis 1."""
    a, b = (v.reshape(1, -1, *[1] * (x.ndim - 2)) for v in (alpha, beta))
    return a * F.softplus(b * x)


@op()
def thresholded_relu(x: Tensor, alpha: float = 1.0) -> Tensor:
    return torch.where(x >= alpha, x, torch.zeros_like(x))


@op(results="a")
def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(cond.bool(), a, b)


@op(results="=dtype")
def cast(x: Tensor, dtype: str) -> Tensor:
    """Floats become integers by cutting what is behind the point; an integer that does not fit wraps."""
    target = DTYPES[dtype]
    if target.kind != "int":
        return x.to(target.held)
    whole = x.trunc().to(torch.int64) if x.is_floating_point() else x.to(torch.int64)
    span = 1 << target.bits
    wrapped = whole % span
    if not target.name.startswith("u"):
        wrapped = torch.where(wrapped >= span // 2, wrapped - span, wrapped)
    return wrapped.to(target.held)


def _by_axis(value: Tensor, x: Tensor, axis: int) -> Tensor:
    return value if value.ndim == 0 else value.reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])


@op(results="=output_dtype", mixed=True)
def quantize(
    input: Tensor, scale: Tensor, output_dtype: str, zero_point: Tensor | None = None, axis: int = 0
) -> Tensor:
    levels = torch.round(input / _by_axis(scale, input, axis))
    if zero_point is not None:
        levels = levels + _by_axis(zero_point, input, axis)
    low, high = (0, 255) if output_dtype == "uint8" else (-128, 127)
    return levels.clamp(low, high).to(DTYPES[output_dtype].held)


@op(results="scale", mixed=True)
def dequantize(input: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: int = 0) -> Tensor:
    levels = input.float()
    if zero_point is not None:
        levels = levels - _by_axis(zero_point.float(), input, axis)
    return levels * _by_axis(scale, input, axis)
