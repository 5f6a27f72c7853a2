"""INT8: 255 even levels and one scale a row, as the weights of LLM.int8() (arXiv:2208.07339), through bitsandbytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from graph.errors import QcError
from graph.formats.format import Call, Rows, V, chunks, has_data
from graph.formats.kernels import kernels
from graph.ops import op

TINY = 1e-36
"""A row whose largest magnitude is below this is stored as zeros: 127 divided by it is no fp32 number."""


@dataclass(frozen=True)
class Int8:
    """8-bit weights: ``indices`` i8 [out, in] and ``scale`` f32 [out], each row's largest magnitude."""

    parameters: ClassVar[tuple[str, ...]] = ()

    @property
    def name(self) -> str:
        return "int8"

    def problem(self, name: str, shape: tuple[int, ...]) -> QcError | None:
        """Any two dimensions will do."""
        if len(shape) == 2:
            return None
        what = f"{name} has the shape {list(shape)}; int8 packs weights of two dimensions"
        return QcError(what, fix="exclude it from select")

    def pack(self, w: Tensor) -> dict[str, Tensor]:
        """w: [out, in], float  ->  the side tensors, as in the class.

        Always on the CPU and from fp32: bitsandbytes' CUDA kernel takes fp16 only, and would overflow where w does not.
        """
        indices, scale = w.new_empty(w.shape, dtype=torch.int8), w.new_empty(w.shape[0], dtype=torch.float32)
        if has_data(w):
            for part in chunks(w):
                levels, largest, _ = kernels().int8_vectorwise_quant.default(w[part].cpu().float(), 0.0)
                blank = largest < TINY
                indices[part], scale[part] = levels.masked_fill_(blank[:, None], 0), largest.masked_fill_(blank, 0.0)
        return {"indices": indices, "scale": scale}

    def call(self, packed: Mapping[str, V], dtype: torch.dtype) -> Call:
        """``qc.dequantize_int8`` and its arguments."""
        return dequantize_int8, (packed["indices"], packed["scale"], dtype), {}

    def by_row(self, packed: Mapping[str, Tensor]) -> Rows:
        """They are by row already."""
        return lambda part: {key: side[part] for key, side in packed.items()}

    def widest_error(self, w: Tensor, packed: Mapping[str, Tensor], largest: float) -> Tensor:
        """Half a step: 1/254 of the row's largest magnitude."""
        return w.float().abs().amax(-1, keepdim=True) / 254


@op
def dequantize_int8(indices: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight that 8-bit integers stand for: ``index * scale / 127``, rounded once to ``dtype``.

    indices: i8 [out, in]    scale: f32 [out]  ->  [out, in]
    """
    if not has_data(indices):
        return indices.new_empty(indices.shape, dtype=dtype)
    dense: Tensor = kernels().int8_vectorwise_dequant.default(indices, scale)
    return dense.to(dtype)
