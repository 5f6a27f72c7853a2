"""Operations that move elements and compute nothing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from runtimes.mil.ops.table import op


@op()
def reshape(x: Tensor, shape: list[int]) -> Tensor:
    """A 0 keeps the length that ``x`` has there."""
    wanted = [x.shape[i] if n == 0 and i < x.ndim and x.numel() else n for i, n in enumerate(shape)]
    return x.reshape(wanted)


@op()
def transpose(x: Tensor, perm: list[int]) -> Tensor:
    return x.permute(perm)


@op()
def expand_dims(x: Tensor, axes: list[int]) -> Tensor:
    rank = x.ndim + len(axes)
    for axis in sorted(a % rank for a in axes):
        x = x.unsqueeze(axis)
    return x


@op()
def squeeze(x: Tensor, axes: list[int] | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze([a % x.ndim for a in axes])


@op(results="values")
def concat(values: list[Tensor], axis: int, interleave: bool = False) -> Tensor:
    if not interleave:
        return torch.cat(values, axis)
    axis %= values[0].ndim
    return torch.stack(values, axis + 1).flatten(axis, axis + 1)


@op(results="values")
def stack(values: list[Tensor], axis: int) -> Tensor:
    return torch.stack(values, axis)


@op()
def split(
    x: Tensor, axis: int, num_splits: int | None = None, split_sizes: list[int] | None = None
) -> tuple[Tensor, ...]:
    if split_sizes is None:
        assert num_splits is not None
        split_sizes = [x.shape[axis] // num_splits] * num_splits
    return torch.split(x, split_sizes, axis)


@op()
def tile(x: Tensor, reps: list[int]) -> Tensor:
    return x.repeat(reps)


@op()
def reverse(x: Tensor, axes: list[int] | None = None) -> Tensor:
    return x.flip(list(range(x.ndim)) if axes is None else axes)


@op()
def pad(x: Tensor, pad: list[int], mode: str = "constant", constant_val: float = 0.0) -> Tensor:
    """``pad`` holds a pair for each of the last axes, the earliest of them first."""
    pairs = [tuple(pad[i : i + 2]) for i in range(0, len(pad), 2)]
    flat = [n for pair in reversed(pairs) for n in pair]
    if mode == "constant":
        return F.pad(x, flat, value=constant_val)
    # torch pads by reflection only along the last axes of a batch; an axis at a time does for any rank
    for axis, (before, after) in enumerate(pairs, start=x.ndim - len(pairs)):
        x = _mirrored(x, axis, before, after, mode)
    return x


def _mirrored(x: Tensor, axis: int, before: int, after: int, mode: str) -> Tensor:
    length = x.shape[axis]
    places = torch.arange(-before, length + after, device=x.device)
    if mode == "reflect":
        places = (length - 1) - ((length - 1) - places.abs()).abs() if length > 1 else places * 0
    else:
        places = places.clamp(0, length - 1)
    return x.index_select(axis, places)


@op()
def flatten2d(x: Tensor, axis: int = 1) -> Tensor:
    rows = 1
    for length in x.shape[: axis % x.ndim]:
        rows *= length
    return x.reshape(rows, -1)


@op()
def reshape_like(
    x: Tensor, ref_tensors: list[Tensor], begins: tuple[int, ...], ends: tuple[int, ...], end_masks: tuple[bool, ...]
) -> Tensor:
    shape: list[int] = []
    for reference, begin, end, masked in zip(ref_tensors, begins, ends, end_masks, strict=True):
        shape += reference.shape[begin : None if masked else end]
    return x.reshape(shape)


@op()
def depth_to_space(x: Tensor, block_size: int) -> Tensor:
    """Channels are numbered (row in the block, column in the block, channel)."""
    n, c, h, w = x.shape
    b = block_size
    blocks = x.reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2)
    return blocks.reshape(n, c // (b * b), h * b, w * b)


@op()
def space_to_depth(x: Tensor, block_size: int) -> Tensor:
    n, c, h, w = x.shape
    b = block_size
    blocks = x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4)
    return blocks.reshape(n, c * b * b, h // b, w // b)


@op()
def pixel_shuffle(x: Tensor, upscale_factor: int) -> Tensor:
    return F.pixel_shuffle(x, upscale_factor)


@op()
def pixel_unshuffle(x: Tensor, downscale_factor: int) -> Tensor:
    return F.pixel_unshuffle(x, downscale_factor)


@op()
def upsample_nearest_neighbor(x: Tensor, scale_factor_height: float = 1.0, scale_factor_width: float = 1.0) -> Tensor:
    size = [int(x.shape[-2] * scale_factor_height), int(x.shape[-1] * scale_factor_width)]
    return F.interpolate(x, size=size, mode="nearest")


@op()
def band_part(x: Tensor, lower: int = -1, upper: int = -1) -> Tensor:
    rows, columns = x.shape[-2:]
    over = torch.arange(columns)[None, :] - torch.arange(rows)[:, None]
    kept = ((lower < 0) | (-over <= lower)) & ((upper < 0) | (over <= upper))
    return torch.where(kept, x, torch.zeros_like(x))


@op(results="int32")
def shape(x: Tensor) -> Tensor:
    return torch.tensor(x.shape, dtype=torch.int32)


@op(results="value")
def fill(shape: list[int], value: Tensor) -> Tensor:
    return value.reshape(()).expand(shape).clone()


@op(results="value")
def fill_like(ref_tensor: Tensor, value: Tensor) -> Tensor:
    return value.reshape(()).expand(ref_tensor.shape).clone()


@op(results="end")
def range_1d(end: Tensor, start: Tensor, step: Tensor) -> Tensor:
    return torch.arange(start.item(), end.item(), step.item(), dtype=end.dtype)
