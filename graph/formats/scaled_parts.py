"""Packing weights of codes and scales a part at a time, and rounding them as packing would.

Rows that share scales with no others are a weight by themselves. In C their scales are found and used in one pass
(native.py); with torch the rows of a part stay in the cache from one op to the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from graph.formats import native
from graph.formats.feedback import rounded_with_feedback
from graph.formats.format import has_data
from graph.formats.memory import scratch
from graph.formats.scales_of import (
    as_c_reads,
    global_scale,
    in_fp32,
    magnitudes,
    read_scales,
    scales_by_row,
    small_chunks,
    stored_as,
)
from graph.pages import room

if TYPE_CHECKING:
    from graph.formats.scaled import Scaled

Fused: TypeAlias = Sequence[Tensor | float] | None

AT_ONCE = 1 << 22
"""Values handed to C at a time. It keeps to the cache by itself; what is made for a whole weight would be large."""


def pack(form: Scaled, w: Tensor) -> dict[str, Tensor]:
    """w: [out, in], float  ->  the side tensors, as in ``Scaled``."""
    codes = _room_for_codes(form, w)
    if not has_data(w):
        return {"indices": codes, **form.scales(w)}
    form = _with_largest(form, w.detach())
    sides = [_pack_rows(form, w[rows].detach(), codes[rows]) for rows in _apart(form, w)]
    return {"indices": codes, **sides[0], "scale": torch.cat([side["scale"] for side in sides])}


def _room_for_codes(form: Scaled, w: Tensor) -> Tensor:
    """u8 [out, in * bits / 8]."""
    rows, size = w.shape[0], w.shape[1] * form.element.bits // 8
    if w.device.type != "cpu":
        return w.new_empty((rows, size), dtype=torch.uint8)
    return room(rows * size).view(rows, size)


def pack_with_feedback(form: Scaled, w: Tensor, covariance: Tensor) -> dict[str, Tensor]:
    """The same scales as ``pack`` finds, and the codes of least error at the outputs.

    w: [out, in], float    covariance: f32 [in, in], the inputs' mean products
    """
    sides = pack(form, w)
    if not has_data(w):
        return sides
    by_row = scales_by_row(read_scales(sides["scale"], sides.get("global_scale")), w.shape[0])(slice(0, w.shape[0]))
    s = by_row.repeat_interleave(w.shape[1] // by_row.shape[1], 1)
    plain = form.element.decode(sides["indices"])
    numbers = rounded_with_feedback(w, s, form.element.nearest, covariance, plain)
    form.element.encode(numbers.add_(0.0), sides["indices"])  # a zero has no sign
    return sides


def nearest(form: Scaled, w: Tensor, dtype: torch.dtype, fused: Fused = None) -> Tensor:
    """``unpack(form, form.pack(w), dtype)``, without the codes.

    w: [out, in]  ->  [out, in]
    """
    dense = torch.empty_like(w, dtype=dtype)
    if not has_data(w):
        return dense
    if fused and form.whole:
        form = replace(form, largest=largest_of([w, *fused]))
    form = _with_largest(form, w.detach())
    for rows in _apart(form, w):
        _round_rows(form, w[rows].detach(), dense[rows])
    return dense


def largest_of(weights: Sequence[Tensor | float]) -> float:
    """The largest magnitude in all of these weights, or of those given in their place; 0 without values."""
    known = (float(magnitudes(w.detach(), w.shape[1]).amax()) for w in weights if isinstance(w, Tensor) and has_data(w))
    return max([*known, *(w for w in weights if isinstance(w, float))], default=0.0)


def _with_largest(form: Scaled, w: Tensor) -> Scaled:
    """NVFP4: the largest magnitude of a weight that shares its global scale with no other."""
    if form.kind != "nvfp4" or form.largest is not None:
        return form
    return replace(form, largest=float(magnitudes(w, w.shape[1]).amax()))


def _apart(form: Scaled, w: Tensor) -> list[slice]:
    """Rows that share scales with no others, as many as are worked on at a time."""
    rows, columns = w.shape
    return small_chunks(rows, columns, of=form.rows or rows, at_once=AT_ONCE if native.reads(w) else None)


def _pack_rows(form: Scaled, w: Tensor, codes: Tensor) -> dict[str, Tensor]:
    """Write the codes; the other side tensors."""
    if form.rows == 1:
        divisor = global_scale(torch.tensor(form.largest)) if form.largest is not None else None
        scale = w.new_empty((w.shape[0], w.shape[1] // (form.columns or w.shape[1])), dtype=torch.float32)
        by = native.Scales(form.stored_scale, form.element.largest, 1.0 if divisor is None else float(divisor))
        if native.pack(form.element.name, as_c_reads(w), by, scale, codes):
            sides = {"scale": stored_as(form.stored_scale, scale)}
            return sides if divisor is None else sides | {"global_scale": divisor}
    sides = form.scales(w)
    for part, scale in _scales_of_parts(w, sides):
        if not native.encode(form.element.name, as_c_reads(w[part]), scale, codes[part]):
            form.element.encode(_divided(form, in_fp32(w[part]), scale), codes[part])
    return sides


def _round_rows(form: Scaled, w: Tensor, dense: Tensor) -> None:
    """Write what the codes stand for."""
    if form.rows == 1:
        divisor = 1.0 if form.largest is None else float(global_scale(torch.tensor(form.largest)))
        by = native.Scales(form.stored_scale, form.element.largest, divisor)
        if native.round_(form.element.name, as_c_reads(w), by, form.columns or w.shape[1], dense):
            return
    for part, scale in _scales_of_parts(w, form.scales(w)):
        if not native.nearest(form.element.name, as_c_reads(w[part]), scale, dense[part]):
            steps = in_fp32(w[part]).unflatten(1, (scale.shape[1], -1)) / scale[..., None]
            dense[part] = form.element.nearest(steps).mul_(scale[..., None]).flatten(1)


def _scales_of_parts(w: Tensor, sides: dict[str, Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Rows that stay in the cache, and the scales of each, f32 [rows, groups]."""
    per_row = scales_by_row(read_scales(sides["scale"], sides.get("global_scale")), w.shape[0])
    return ((part, per_row(part).contiguous()) for part in small_chunks(*w.shape))


def _divided(form: Scaled, w: Tensor, scale: Tensor) -> Tensor:
    """Rows of a weight in steps; a zero has no sign. The result lasts until the next is asked for.

    w: f32 [rows, columns]    scale: f32 [rows, groups]  ->  f32 [rows, columns]
    """
    x, largest = scratch("scaled.x", tuple(w.shape), torch.float32, w.device), form.element.largest
    shape = (scale.shape[1], w.shape[1] // scale.shape[1])
    torch.div(w.unflatten(1, shape), scale[..., None], out=x.unflatten(1, shape))
    if form.kind in ("mxfp4", "nvfp4"):
        x.add_(0.0)
    if form.kind.startswith("mx"):  # a power of two may be half as large as the largest magnitude asks for
        x.clamp_(-largest, largest)
    elif form.scale_dtype is torch.float16:  # nor does fp16 come near to small scales
        x.clamp_(-largest - 0.5, largest)
    return x
