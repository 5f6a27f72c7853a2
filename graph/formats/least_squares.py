"""Many small least-squares problems at once, by conjugate gradients (M. Hestenes, E. Stiefel, 1952).

The scales of one row minimise a quadratic in as many unknowns as there are ranks. Its matrix is near a multiple of the
identity where the other factor is orthonormal, so a few steps from the present solution come close to the exact one,
and none of the matrices is ever made. Each step lowers every row's error.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

STEPS = 2
"""Between two choices of levels; what is left is made up for in the next round."""


def descend(normal: Callable[[Tensor], Tensor], right: Tensor, start: Tensor, dim: int, steps: int = STEPS) -> Tensor:
    """Nearer to the solution of ``normal(x) = right``, for symmetric positive semi-definite systems side by side.

    right, start: [n, r] with ``dim`` 1, or [r, n] with ``dim`` 0  ->  like start

    ``normal`` multiplies every system's unknowns by its matrix. A solved system stays as it is.
    """
    x = start.clone()
    residual = right - normal(x)
    direction = residual
    square = residual.square().sum(dim, keepdim=True)
    for _ in range(steps):
        image = normal(direction)
        curvature = (direction * image).sum(dim, keepdim=True)
        step = torch.where(curvature > 0, square / curvature, 0.0)
        x.addcmul_(step, direction)
        residual = residual - step * image
        before, square = square, residual.square().sum(dim, keepdim=True)
        direction = residual + torch.where(before > 0, square / before, 0.0) * direction
    return x
