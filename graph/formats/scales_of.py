"""The scales of scaled formats: found from the largest magnitudes under them, stored, and read.

float  the scale itself, f32, bf16 or fp16
e4m3   NVFP4: scale times the global scale, as e4m3; the global scale is a divisor, 448 * 6 / the largest magnitude
e8m0   MX: a power of two, ``2^(byte - 127)`` (OCP Microscaling Formats 1.0)

Every number is what compressed-tensors finds of an fp32 weight.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from graph.formats import native
from graph.formats.elements import Element, decode_e4m3, encode_e4m3
from graph.formats.format import has_data
from graph.formats.memory import scratch

SMALL = 1 << 18
"""Values worked on at a time: what is made of them stays in the cache, and they outweigh the calls."""

E4M3_ZERO = 0.125
"""What a scale that rounds to zero becomes in e4m3."""


def small_chunks(rows: int, columns: int, of: int = 1, at_once: int | None = None) -> list[slice]:
    """The rows of a weight, in slices of about ``at_once`` or ``SMALL`` values, each of a multiple of ``of`` rows."""
    step = max(1, (at_once or SMALL) // max(1, columns * of)) * of
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def in_fp32(w: Tensor) -> Tensor:
    """The same values, contiguous; what is not fp32 yet lasts until the next is asked for."""
    if w.dtype == torch.float32:
        return w.contiguous()
    return scratch("in_fp32", tuple(w.shape), torch.float32, w.device).copy_(w)


def as_c_reads(w: Tensor) -> Tensor:
    """The same values, contiguous, in a dtype that native.py reads; they last as those of ``in_fp32`` do."""
    return w.contiguous() if w.dtype in native.FLOATS else in_fp32(w)


def magnitudes(w: Tensor, columns: int) -> Tensor:
    """The largest magnitude of every ``columns`` columns of every row.

    w: [out, in]  ->  f32 [out, in / columns]
    """
    found = w.new_empty((w.shape[0], w.shape[1] // columns), dtype=torch.float32)
    if not has_data(w) or native.magnitudes(w, columns, found):
        return found
    for part in small_chunks(*w.shape):
        rows = in_fp32(w[part])
        if native.magnitudes(rows, columns, found[part]):
            continue
        room = scratch("magnitudes", tuple(rows.shape), torch.float32, w.device)
        bits = torch.abs(rows, out=room).view(torch.int32)  # of magnitudes, bits are in order
        torch.amax(bits.unflatten(1, (-1, columns)), -1, out=found[part].view(torch.int32))
    return found


def global_scale(largest: Tensor) -> Tensor:
    """The divisor of NVFP4 scales, so that the largest of them is the largest e4m3 number.

    largest: f32 [], the largest magnitude of all weights that share it  ->  f32 [1]
    """
    if not has_data(largest):
        return largest.new_empty(1)
    found = 448.0 * 6.0 / largest.clamp_min(torch.finfo(torch.float32).tiny)
    return found.nan_to_num_(posinf=1.0).reshape(1)


def float_scales(largest: Tensor, element: Element, dtype: torch.dtype) -> Tensor:
    """The scale under which the largest magnitude becomes the largest element; where all is zero, a tiny one.

    largest: f32 [blocks of rows, blocks of columns]  ->  the same in ``dtype``
    """
    scale = (largest / element.largest).to(dtype)
    return scale.masked_fill_(scale == 0, torch.finfo(dtype).eps)


def e4m3_scales(largest: Tensor, divisor: Tensor) -> Tensor:
    """largest: f32 [out, groups]    divisor: f32 [1]  ->  u8 [out, groups]."""
    codes = encode_e4m3(divisor * (largest / 6.0))
    return codes.masked_fill_(codes == 0, int(encode_e4m3(torch.tensor([E4M3_ZERO]))))


def e8m0_scales(largest: Tensor, element: Element) -> Tensor:
    """The power of two below the largest magnitude, over that of the largest element; from 1.75 times on the next one.

    largest: f32 [out, groups]  ->  u8 [out, groups]
    """
    exponent = (largest.view(torch.int32) + (1 << 21)) >> 23
    top = 8 if element.bits == 8 else 2
    return exponent.sub_(top).clamp_(0, 254).to(torch.uint8)


def read_scales(scale: Tensor, divisor: Tensor | None) -> Tensor:
    """What codes are multiplied by, f32, of the shape of ``scale``; u8 is e4m3 with a divisor, else e8m0."""
    if scale.dtype != torch.uint8:
        return scale.float()
    if divisor is not None:
        return decode_e4m3(scale) / divisor
    return (scale.int() << 23).clamp_min_(1 << 22).view(torch.float32)  # the last of them, 2^-127, has no exponent bits


def stored_as(dtype: torch.dtype, scale: Tensor) -> Tensor:
    """Scales that are numbers of this dtype already, as side tensors hold them.

    scale: f32  ->  the same in ``dtype``; e4m3 and e8m0 as u8
    """
    if dtype == torch.float8_e8m0fnu:
        return (scale.view(torch.int32) >> 23).to(torch.uint8)
    return scale.to(dtype).view(torch.uint8) if dtype == torch.float8_e4m3fn else scale.to(dtype)


def scales_by_row(scale: Tensor, rows: int) -> Callable[[slice], Tensor]:
    """Gives the scales of some of ``rows`` rows, each with as many as ``scale`` has columns."""
    if scale.shape[0] == rows:
        return lambda part: scale[part]
    share = rows // scale.shape[0]
    numbers = torch.arange(rows, device=scale.device) // share
    return lambda part: scale[numbers[part]]
