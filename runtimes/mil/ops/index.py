"""Slices, gathers and scatters."""

from __future__ import annotations

import torch
from torch import Tensor

from runtimes.mil.ops.table import op


def places(
    shape: torch.Size,
    begin: list[int],
    end: list[int],
    stride: list[int] | None,
    begin_mask: list[bool] | None,
    end_mask: list[bool] | None,
    squeeze_mask: list[bool] | None,
) -> list[slice | int]:
    """What each axis keeps. A masked border is that of the axis; a negative one counts from its end."""
    rank = len(begin)
    steps = stride or [1] * rank
    from_start, to_end, single = (mask or [False] * rank for mask in (begin_mask, end_mask, squeeze_mask))
    found: list[slice | int] = []
    for axis in range(rank):
        if single[axis]:
            found.append(begin[axis])
            continue
        first = None if from_start[axis] else begin[axis]
        last = None if to_end[axis] else end[axis]
        if steps[axis] < 0 and last is not None and last < 0 and end[axis] < -shape[axis]:
            last = None
        found.append(slice(first, last, steps[axis]))
    return found


def _taken(x: Tensor, kept: list[slice | int]) -> Tensor:
    """``x[kept]``; torch itself has no negative steps."""
    for axis, one in enumerate(kept):
        if isinstance(one, slice) and one.step < 0:
            numbers = list(range(x.shape[axis]))[one]
            x = x.index_select(axis, torch.tensor(numbers, dtype=torch.int64))
            kept[axis] = slice(None)
    return x[tuple(kept)]


@op()
def slice_by_index(
    x: Tensor,
    begin: list[int],
    end: list[int],
    stride: list[int] | None = None,
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> Tensor:
    return _taken(x, places(x.shape, begin, end, stride, begin_mask, end_mask, squeeze_mask))


@op()
def slice_by_size(x: Tensor, begin: list[int], size: list[int]) -> Tensor:
    for axis, (first, length) in enumerate(zip(begin, size, strict=True)):
        first %= x.shape[axis] or 1
        x = x.narrow(axis, first, x.shape[axis] - first if length == -1 else length)
    return x


@op()
def slice_update(
    x: Tensor,
    update: Tensor,
    begin: list[int],
    end: list[int],
    stride: list[int] | None = None,
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> Tensor:
    """A copy of ``x`` with a part replaced. The part has exactly the shape of ``update``: nothing is broadcast."""
    return slice_overwritten(x.clone(), update, begin, end, stride, begin_mask, end_mask, squeeze_mask)


def slice_overwritten(
    x: Tensor,
    update: Tensor,
    begin: list[int],
    end: list[int],
    stride: list[int] | None = None,
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> Tensor:
    """``x`` itself with a part replaced: ``slice_update`` where nobody needs what ``x`` was."""
    kept = places(x.shape, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    if any(isinstance(one, slice) and one.step < 0 for one in kept):
        raise ValueError("slice_update with a negative stride")
    part = x[tuple(kept)]
    if part.shape != update.shape:
        raise ValueError(f"the part is {list(part.shape)}, the update {list(update.shape)}")
    part.copy_(update)
    return x


@op()
def gather(x: Tensor, indices: Tensor, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False) -> Tensor:
    """Whole slices along an axis; the first ``batch_dims`` axes go together."""
    axis %= x.ndim
    if batch_dims:
        rows = [gather(a, b, axis - 1, batch_dims - 1) for a, b in zip(x, indices, strict=True)]
        return torch.stack(rows)
    numbers = _counted(indices, x.shape[axis])
    taken = x.index_select(axis, numbers.reshape(-1))
    return taken.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


def _counted(indices: Tensor, length: int) -> Tensor:
    """Indices as int64, those from the end made plain. One outside is an error here; a device may read anything."""
    numbers = indices.to(torch.int64)
    if bool((numbers < -length).any()) or bool((numbers >= length).any()):
        raise IndexError(f"an index lies outside the {length} rows")
    return torch.where(numbers < 0, numbers + length, numbers)


@op()
def gather_along_axis(x: Tensor, indices: Tensor, axis: int = 0, validate_indices: bool = False) -> Tensor:
    return x.gather(axis, _counted(indices, x.shape[axis]))


@op()
def gather_nd(x: Tensor, indices: Tensor, batch_dims: int = 0, validate_indices: bool = False) -> Tensor:
    """The last axis of ``indices`` holds the coordinates."""
    if batch_dims:
        return torch.stack([gather_nd(a, b, batch_dims - 1) for a, b in zip(x, indices, strict=True)])
    coordinates = [_counted(part, x.shape[axis]) for axis, part in enumerate(indices.unbind(-1))]
    return x[tuple(coordinates)]


@op(results="data")
def scatter(
    data: Tensor, indices: Tensor, updates: Tensor, axis: int = 0, mode: str = "add", validate_indices: bool = False
) -> Tensor:
    """``updates`` has the axes of ``indices`` in the place of ``axis``."""
    axis %= data.ndim
    numbers = _counted(indices, data.shape[axis])
    rows = updates.flatten(axis, axis + indices.ndim - 1) if indices.ndim else updates.unsqueeze(axis)
    spread = numbers.reshape([-1 if i == axis else 1 for i in range(data.ndim)]).expand(rows.shape)
    return scatter_along_axis(data, spread, rows, axis, mode)


_REDUCE = {"mul": "prod", "max": "amax", "min": "amin", "add": "sum"}


@op(results="data")
def scatter_along_axis(
    data: Tensor, indices: Tensor, updates: Tensor, axis: int = 0, mode: str = "add", validate_indices: bool = False
) -> Tensor:
    numbers = _counted(indices, data.shape[axis])
    if mode == "update":
        return data.scatter(axis, numbers, updates)
    signed = -updates if mode == "sub" else updates.reciprocal() if mode == "div" else updates
    reduce = "sum" if mode == "sub" else "prod" if mode == "div" else _REDUCE[mode]
    return data.scatter_reduce(axis, numbers, signed, reduce)


@op(results="data")
def scatter_nd(
    data: Tensor, indices: Tensor, updates: Tensor, mode: str = "add", validate_indices: bool = False
) -> Tensor:
    depth = indices.shape[-1]
    flat, place = data.reshape(-1, *data.shape[depth:]), torch.zeros(indices.shape[:-1], dtype=torch.int64)
    for axis in range(depth):
        place = place * data.shape[axis] + _counted(indices[..., axis], data.shape[axis])
    rows = updates.reshape(-1, *data.shape[depth:])
    return scatter(flat, place.reshape(-1), rows, 0, mode).reshape(data.shape)


@op(results="on_value")
def one_hot(indices: Tensor, one_hot_vector_size: int, on_value: Tensor, off_value: Tensor, axis: int = -1) -> Tensor:
    numbers = torch.arange(one_hot_vector_size)
    hit = (indices.unsqueeze(-1) == numbers).movedim(-1, axis)
    return torch.where(hit, on_value, off_value)


@op(results="int32")
def non_zero(x: Tensor) -> Tensor:
    return x.nonzero().to(torch.int32)
