"""The ``constexpr`` operations: how a compressed weight becomes a dense one when a program is loaded.

Those of opset CoreML8 take tensors of sub-byte elements; those before it take packed bytes and a shape.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from runtimes.mil.blob import unpack
from runtimes.mil.ops.table import op
from runtimes.mil.types import DTYPES

_PART = 1 << 22
"""Elements that are looked up at once, to bound the memory of their indices."""


@op(results="lut", mixed=True)
def constexpr_lut_to_dense(
    indices: Tensor, lut: Tensor, vector_axis: int | None = None, shape: list[int] | None = None
) -> Tensor:
    """indices: [n_0, ...]    lut: [g_0, ..., entries, V]  ->  [n_0, ...], with n * V along ``vector_axis``.

    Each axis is cut into g equal runs, and each box of runs has a table of its own. Before CoreML8 there is one table
    [entries], and ``indices`` are packed bytes.
    """
    if shape is not None:
        bits = len(lut).bit_length() - 1
        packed = indices.numpy()
        count = int(np.prod(shape))
        numbers = packed if bits == 8 else unpack(packed, DTYPES[f"uint{bits}"], count)
        return _looked_up(torch.from_numpy(numbers), lut).reshape(shape)
    groups, (entries, width) = lut.shape[:-2], lut.shape[-2:]
    if all(g == 1 for g in groups) and width == 1:
        return _looked_up(indices.reshape(-1), lut.reshape(-1)).reshape(indices.shape)
    box = torch.zeros([1] * indices.ndim, dtype=torch.int64)
    for axis, (length, runs) in enumerate(zip(indices.shape, groups, strict=True)):
        if length % runs:
            raise ValueError(f"{runs} tables do not divide the {length} indices of axis {axis}")
        run = torch.arange(length) // (length // runs)
        box = box * runs + run.reshape([-1 if i == axis else 1 for i in range(indices.ndim)])
    values = lut.reshape(-1, entries, width)[box, indices.to(torch.int64)]
    if width == 1:
        return values.squeeze(-1)
    axis = (vector_axis or 0) % indices.ndim
    return values.movedim(-1, axis + 1).flatten(axis, axis + 1)


def _looked_up(indices: Tensor, table: Tensor) -> Tensor:
    parts = [table.index_select(0, part.to(torch.int32)) for part in torch.split(indices, _PART)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _repeated(values: Tensor, shape: torch.Size) -> Tensor:
    """Values by block -> one an element."""
    for axis, (length, blocks) in enumerate(zip(shape, values.shape, strict=True)):
        if length % blocks:
            raise ValueError(f"{blocks} blocks do not divide the {length} elements of axis {axis}")
        if blocks not in (1, length):
            values = values.repeat_interleave(length // blocks, axis)
    return values


@op(results="scale", mixed=True)
def constexpr_blockwise_shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """Give scale * (data - offset), with a scale a block."""
    levels = data.float()
    if offset is not None:
        levels = levels - _repeated(offset.float(), data.shape)
    return levels * _repeated(scale, data.shape)


@op(results="nonzero_data", mixed=True)
def constexpr_sparse_to_dense(nonzero_data: Tensor, mask: Tensor, shape: list[int] | None = None) -> Tensor:
    if shape is not None:
        bits = unpack(mask.numpy(), DTYPES["uint1"], int(np.prod(shape)))
        mask = torch.from_numpy(bits).reshape(shape)
    kept = mask.bool()
    if int(kept.sum()) != len(nonzero_data):
        raise ValueError(f"the mask keeps {int(kept.sum())} elements, there are {len(nonzero_data)}")
    result = torch.zeros(mask.shape, dtype=nonzero_data.dtype)
    result[kept] = nonzero_data
    return result


@op(results="indices_mask lut", mixed=True)
def constexpr_lut_to_sparse(
    indices_mask: Tensor, indices_nonzero_data: Tensor, lut: Tensor, vector_axis: int | None = None
) -> tuple[Tensor, Tensor]:
    dense = constexpr_lut_to_dense(constexpr_sparse_to_dense(indices_nonzero_data, indices_mask), lut, vector_axis)
    width = lut.shape[-1]
    mask = indices_mask if width == 1 else indices_mask.repeat_interleave(width, vector_axis or 0)
    return mask, dense[mask.bool()]


@op(results="data_mask scale", mixed=True)
def constexpr_sparse_blockwise_shift_scale(
    data_mask: Tensor, nonzero_data: Tensor, scale: Tensor, offset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    dense = constexpr_blockwise_shift_scale(constexpr_sparse_to_dense(nonzero_data, data_mask), scale, offset)
    return data_mask, dense[data_mask.bool()]


@op(results="scale", mixed=True)
def constexpr_affine_dequantize(quantized_data: Tensor, zero_point: Tensor, scale: Tensor, axis: int) -> Tensor:
    shape = [-1 if i == axis % quantized_data.ndim else 1 for i in range(quantized_data.ndim)]
    zero, step = (v.float().reshape(shape if v.ndim else []) for v in (zero_point, scale))
    return (quantized_data.float() - zero) * step


@op(results="=output_dtype", mixed=True)
def constexpr_cast(source_val: Tensor, output_dtype: str) -> Tensor:
    return source_val
