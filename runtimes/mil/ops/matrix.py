"""Products of matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from runtimes.mil.ops.table import op


@op()
def matmul(x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    """A vector counts as a row on the left and as a column on the right, and is not transposed."""
    a = x.mT if transpose_x and x.ndim > 1 else x
    b = y.mT if transpose_y and y.ndim > 1 else y
    return a @ b


@op()
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Shapes: x [..., in], weight [out, in]  ->  [..., out]."""
    result = x @ weight.mT
    return result if bias is None else result + bias


@op(results="values")
def einsum(values: list[Tensor], equation: str) -> Tensor:
    return torch.einsum(equation, *values)
