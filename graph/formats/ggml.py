"""Groups of 32 weights rounded as llama.cpp rounds them, in its encodings Q8_0 and Q4_0: integers times fp16 scales.

Q8_0  scale = largest magnitude / 127                   codes -127 to 127, halves away from zero
Q4_0  scale = the value of largest magnitude / -8       codes -8 to 7, halves upwards

So a scale of Q4_0 is negative where that value is positive: it is always -8 times the scale, and nothing saturates but
a value as large on the other side. Codes are found under the fp32 scale, which is rounded to fp16 behind them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from graph.formats.format import chunks, has_data
from graph.formats.scaled import Scaled

Encoding: TypeAlias = Literal["q8_0", "q4_0"]

GROUP = 32
"""Weights of a row that share a scale."""

_FORMS: dict[Encoding, Scaled] = {
    "q8_0": Scaled("int8", 1, GROUP, torch.float16),
    "q4_0": Scaled("int4", 1, GROUP, torch.float16),
}


def form_of(encoding: Encoding) -> Scaled:
    """The format that such weights have."""
    return _FORMS[encoding]


def rounded_groups(encoding: Encoding, w: Tensor) -> dict[str, Tensor]:
    """The side tensors of a weight [out, in] as llama.cpp rounds it; of a plan their types alone.

    Where fp16 has no number for a scale, it is infinite; where ``w`` has one that is none, NaN.
    """
    form, (rows, columns) = form_of(encoding), w.shape
    codes = w.new_empty((rows, columns * form.element.bits // 8), dtype=torch.uint8)
    scale = w.new_empty((rows, columns // GROUP), dtype=torch.float16)
    if has_data(w):
        for part in chunks(w):
            integers, found = _ROUNDING[encoding](w[part].float().unflatten(1, (-1, GROUP)))
            codes[part], scale[part] = integers.flatten(1), found
    return {"indices": codes, "scale": scale}


def _q8_0(groups: Tensor) -> tuple[Tensor, Tensor]:
    """groups: f32 [rows, n, 32]  ->  u8 [rows, n, 32], 128 added    f32 [rows, n]."""
    scale = groups.abs().amax(-1) / 127
    steps = groups * _inverse(scale)[..., None]
    whole = steps.abs().floor()
    up = (2 * (steps.abs() - whole)).floor()
    return ((whole + up) * steps.sign() + 128).to(torch.uint8), scale


def _q4_0(groups: Tensor) -> tuple[Tensor, Tensor]:
    """groups: f32 [rows, n, 32]  ->  u8 [rows, n, 16], 8 added, the first in the low half    f32 [rows, n]."""
    first = groups.abs().argmax(-1, keepdim=True)  # of two as large, the first
    scale = groups.gather(-1, first).squeeze(-1) / -8
    codes = (groups * _inverse(scale)[..., None] + 8.5).floor_().clamp_(0, 15).to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, scale


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale; 0 where that is no number of fp32, and the scale none of fp16."""
    return (1 / scale).nan_to_num_(posinf=0.0, neginf=0.0)


_ROUNDING: dict[Encoding, Callable[[Tensor], tuple[Tensor, Tensor]]] = {"q8_0": _q8_0, "q4_0": _q4_0}
