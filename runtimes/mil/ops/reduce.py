"""Reductions, softmax, sorting and running sums."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from runtimes.mil.ops.table import KERNELS, Kernel, Parameter, op


def _axes(x: Tensor, axes: list[int] | None) -> list[int]:
    return list(range(x.ndim)) if axes is None else axes


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((a % x.ndim for a in axes), reverse=True):
        x = x.prod(axis, keepdim=keep).to(x.dtype)
    return x


_REDUCTIONS: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "reduce_l1_norm": lambda x, axes, keep: x.abs().sum(axes, keep),
    "reduce_l2_norm": lambda x, axes, keep: x.square().sum(axes, keep).sqrt(),
    "reduce_log_sum": lambda x, axes, keep: x.sum(axes, keep).log(),
    "reduce_log_sum_exp": lambda x, axes, keep: torch.logsumexp(x, axes, keep),
    "reduce_max": lambda x, axes, keep: x.amax(axes, keep),
    "reduce_mean": lambda x, axes, keep: x.mean(axes, keep),
    "reduce_min": lambda x, axes, keep: x.amin(axes, keep),
    "reduce_prod": _product,
    "reduce_sum": lambda x, axes, keep: x.sum(axes, keep).to(x.dtype),
    "reduce_sum_square": lambda x, axes, keep: x.square().sum(axes, keep).to(x.dtype),
}


def _reduction(compute: Callable[[Tensor, list[int], bool], Tensor]) -> Callable[..., Tensor]:
    def reduce(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
        return compute(x, _axes(x, axes), keep_dims)

    return reduce


_PARAMETERS = (
    Parameter("x", "tensor", True),
    Parameter("axes", "value", False),
    Parameter("keep_dims", "value", False),
)
for _name, _compute in _REDUCTIONS.items():
    KERNELS[_name] = Kernel(_name, _reduction(_compute), _PARAMETERS, ("x",))


@op(results="=output_dtype")
def reduce_argmax(x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32") -> Tensor:
    return x.argmax(axis, keep_dims).to(torch.int32)


@op(results="=output_dtype")
def reduce_argmin(x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32") -> Tensor:
    return x.argmin(axis, keep_dims).to(torch.int32)


@op()
def softmax(x: Tensor, axis: int = -1) -> Tensor:
    return torch.softmax(x, axis)


@op()
def cumsum(x: Tensor, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Tensor:
    flow = x.flip(axis) if reverse else x
    total = flow.cumsum(axis).to(x.dtype)
    total = total - flow if exclusive else total
    return total.flip(axis) if reverse else total


@op(results="int32")
def argsort(x: Tensor, axis: int = -1, ascending: bool = False) -> Tensor:
    return torch.argsort(x, dim=axis, descending=not ascending, stable=True).to(torch.int32)


@op(results="x =output_indices_dtype")
def topk(
    x: Tensor,
    k: int = 1,
    axis: int = -1,
    ascending: bool = False,
    sort: bool = True,
    return_indices: bool = True,
    output_indices_dtype: str = "int32",
) -> tuple[Tensor, ...]:
    values, indices = torch.sort(x, dim=axis, descending=not ascending, stable=True)
    length = x.shape[axis] if k == -1 else k
    found = values.narrow(axis, 0, length), indices.narrow(axis, 0, length).to(torch.int32)
    return found if return_indices else found[:1]
