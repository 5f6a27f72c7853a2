"""Convolutions and pooling, with every kind of padding."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from runtimes.mil.ops.table import op

_CONV = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def borders(
    pad_type: str, pad: list[int] | None, lengths: list[int], kernel: list[int], strides: list[int]
) -> list[tuple[int, int]]:
    """Elements to add before and after each spatial axis; ``kernel`` counts dilation.

    ``same`` gives ceil(length / stride) results and puts an odd element at the end, ``same_lower`` at the beginning.
    """
    if pad_type == "valid":
        return [(0, 0)] * len(lengths)
    if pad_type == "custom":
        assert pad is not None
        return [(pad[2 * i], pad[2 * i + 1]) for i in range(len(lengths))]
    found = []
    for length, reach, stride in zip(lengths, kernel, strides, strict=True):
        total = max(0, (math.ceil(length / stride) - 1) * stride + reach - length)
        small, large = total // 2, total - total // 2
        found.append((small, large) if pad_type == "same" else (large, small))
    return found


def _flat(pairs: list[tuple[int, int]]) -> list[int]:
    return [n for pair in reversed(pairs) for n in pair]


def is_pointwise(x: Tensor, weight: Tensor, strides: list[int] | None, groups: int) -> bool:
    """Whether a convolution is a product of matrices over the channels."""
    single = all(n == 1 for n in weight.shape[2:])
    return single and groups == 1 and all(s == 1 for s in strides or ())


@op()
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: list[int] | None = None,
    pad_type: str = "valid",
    pad: list[int] | None = None,
    dilations: list[int] | None = None,
    groups: int = 1,
) -> Tensor:
    """Shapes: x [n, in, *spatial], weight [out, in / groups, *kernel]  ->  [n, out, *spatial]."""
    spatial = x.ndim - 2
    if pad_type != "custom" and is_pointwise(x, weight, strides, groups):
        flat = weight.reshape(weight.shape[:2]) @ x.flatten(2)
        result = flat.reshape(x.shape[0], weight.shape[0], *x.shape[2:])
        return result if bias is None else result + bias.reshape(-1, *[1] * spatial)
    strides, dilations = strides or [1] * spatial, dilations or [1] * spatial
    reach = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilations, strict=True)]
    pairs = borders(pad_type, pad, list(x.shape[2:]), reach, strides)
    padded = F.pad(x, _flat(pairs))
    result = _CONV[spatial - 1](padded, weight, bias, strides, 0, dilations, groups)
    assert isinstance(result, Tensor)
    return result


@op()
def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pad: list[int] | None = None,
    output_shape: list[int] | None = None,
    pad_type: str = "valid",
    strides: list[int] | None = None,
    dilations: list[int] | None = None,
    groups: int = 1,
) -> Tensor:
    """weight: [in, out / groups, *kernel]. Padding cuts what the full result has at its borders."""
    spatial = x.ndim - 2
    strides, dilations = strides or [1] * spatial, dilations or [1] * spatial
    full = _TRANSPOSED[spatial - 1](x, weight, bias, strides, 0, 0, groups, dilations)
    cut = [(0, 0)] * spatial
    if pad_type == "custom":
        assert pad is not None
        cut = [(pad[2 * i], pad[2 * i + 1]) for i in range(spatial)]
    elif pad_type.startswith("same"):
        over = [f - n * s for f, n, s in zip(full.shape[2:], x.shape[2:], strides, strict=True)]
        cut = [(o // 2, o - o // 2) if pad_type == "same" else (o - o // 2, o // 2) for o in over]
    for axis, (before, after) in enumerate(cut, start=2):
        length = full.shape[axis] - before - after
        if output_shape is not None:  # strides leave open how much of the last step there is
            wanted = output_shape[axis]
            full = F.pad(full, _flat([(0, max(0, before + wanted - full.shape[axis])) if a == axis else (0, 0)
                                      for a in range(2, full.ndim)]))  # fmt: skip
            length = wanted
        full = full.narrow(axis, before, length)
    assert isinstance(full, Tensor)
    return full


def _windows(
    x: Tensor, sizes: list[int], strides: list[int], pairs: list[tuple[int, int]], ceil_mode: bool, fill: float
) -> tuple[Tensor, list[tuple[int, int]]]:
    """``x`` padded, and its borders, those included that rounding up asks for."""
    grown = []
    for length, size, stride, (before, after) in zip(x.shape[2:], sizes, strides, pairs, strict=True):
        count = (length + before + after - size) / stride
        steps = math.ceil(count) if ceil_mode else math.floor(count)
        if ceil_mode and steps * stride >= length + before and (before or after):
            steps -= 1
        grown.append((before, after + max(0, steps * stride + size - length - before - after)))
    return F.pad(x, _flat(grown), value=fill), grown


@op()
def max_pool(
    x: Tensor,
    kernel_sizes: list[int],
    strides: list[int] | None = None,
    pad_type: str = "valid",
    pad: list[int] | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    strides = strides or [1] * len(kernel_sizes)
    pairs = borders(pad_type, pad, list(x.shape[2:]), kernel_sizes, strides)
    padded, _ = _windows(x, kernel_sizes, strides, pairs, ceil_mode, -torch.inf)
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel_sizes) - 1]
    result = pool(padded, kernel_sizes, strides)
    assert isinstance(result, Tensor)
    return result


@op()
def avg_pool(
    x: Tensor,
    kernel_sizes: list[int],
    strides: list[int] | None = None,
    pad_type: str = "valid",
    pad: list[int] | None = None,
    exclude_padding_from_average: bool = False,
    ceil_mode: bool = False,
) -> Tensor:
    """What rounding up adds never counts; padding counts unless it is excluded."""
    strides = strides or [1] * len(kernel_sizes)
    pairs = borders(pad_type, pad, list(x.shape[2:]), kernel_sizes, strides)
    padded, grown = _windows(x, kernel_sizes, strides, pairs, ceil_mode, 0.0)
    counted = F.pad(torch.ones_like(x), _flat(pairs), value=0.0 if exclude_padding_from_average else 1.0)
    counted = F.pad(counted, _flat([(0, g[1] - p[1]) for g, p in zip(grown, pairs, strict=True)]))
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(kernel_sizes) - 1]
    result = pool(padded, kernel_sizes, strides) / pool(counted, kernel_sizes, strides)
    assert isinstance(result, Tensor)
    return result
