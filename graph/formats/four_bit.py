"""NF4 and FP4: 16 levels, one scale per block of a row. The bytes are those of bitsandbytes (arXiv:2305.14314).

Two indices a byte, the earlier value in the high half. ``absmax`` is each block's largest magnitude; with double
quantization it is itself stored in 8 bits, as the distance from its mean, in blocks of 256.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import ClassVar, Literal

import torch
from torch import Tensor

from graph.errors import QcError
from graph.formats import native
from graph.formats.format import Call, Rows, V, chunks, has_data
from graph.formats.kernels import kernels
from graph.formats.scales_of import as_c_reads
from graph.ops import op

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""The block sizes that bitsandbytes has kernels for."""

NESTED_BLOCK = 256
"""Blocks whose ``absmax`` share one scale in double quantization."""


@dataclass(frozen=True)
class FourBit:
    """4-bit weights: ``indices`` u8 [out, in / 2] and ``absmax`` f32 [out, in / block].

    With ``double_quant``, ``absmax`` is u8, beside ``absmax_scale`` f32 [blocks / 256] and ``absmax_offset`` f32 [].
    """

    parameters: ClassVar[tuple[str, ...]] = ()

    kind: Literal["nf4", "fp4"] = "nf4"
    block: int = 64
    double_quant: bool = False

    @property
    def name(self) -> str:
        return f"{self.kind}, blocks of {self.block}{', double-quantized' if self.double_quant else ''}"

    def problem(self, name: str, shape: tuple[int, ...]) -> QcError | None:
        """Blocks may not run over the end of a row: then any set of rows is a weight of the same format."""
        if self.block not in BLOCKS:
            sizes = ", ".join(map(str, BLOCKS))
            return QcError(f"block {self.block} is not a block size of {self.kind}", fix=f"set block to one of {sizes}")
        if len(shape) != 2:
            what = f"{name} has the shape {list(shape)}; {self.kind} packs weights of two dimensions"
            return QcError(what, fix="exclude it from select")
        if shape[1] % self.block == 0:
            return None
        fitting = " or ".join(str(b) for b in BLOCKS if shape[1] % b == 0)
        return QcError(
            f"block {self.block} does not divide the {shape[1]} input columns of {name}",
            fix=f"{f'set block to {fitting}, or ' if fitting else 'no block size does; '}exclude it from select",
        )

    def pack(self, w: Tensor) -> dict[str, Tensor]:
        """w: [out, in], float  ->  the side tensors, as in the class."""
        rows, columns = w.shape
        assert columns % self.block == 0, "see problem()"
        indices = w.new_empty((rows, columns // 2), dtype=torch.uint8)
        absmax = w.new_empty((rows, columns // self.block), dtype=torch.float32)
        if has_data(w):
            for part in chunks(w):
                read = as_c_reads(w[part])
                if self.kind == "nf4" and native.encode_levels(read, _bounds(), absmax[part], indices[part]):
                    continue
                packed, largest = kernels().quantize_4bit.default(w[part], self.block, self.kind, torch.uint8)
                indices[part], absmax[part] = packed.view(-1, columns // 2), largest.view(-1, columns // self.block)
        found = {"indices": indices, "absmax": absmax}
        return found | _compress(absmax) if self.double_quant else found

    def call(self, packed: Mapping[str, V], dtype: torch.dtype) -> Call:
        """``qc.dequantize_4bit`` and its arguments."""
        nested = {key: value for key, value in packed.items() if key.startswith("absmax_")}
        return dequantize_4bit, (packed["indices"], packed["absmax"], self.kind, dtype), nested

    def by_row(self, packed: Mapping[str, Tensor]) -> Rows:
        """Without double quantization, whose groups of 256 blocks run over the ends of rows."""
        absmax = block_scales(packed["absmax"], packed.get("absmax_scale"), packed.get("absmax_offset"))
        return lambda part: {"indices": packed["indices"][part], "absmax": absmax[part]}

    def widest_error(self, w: Tensor, packed: Mapping[str, Tensor], largest: float) -> Tensor:
        """Half the widest gap between levels, times the block's largest magnitude; more if that one is rounded too."""
        scales = w.float().view(w.shape[0], -1, self.block).abs().amax(-1)
        rounding = largest * _half_gap(_dynamic_map()) if self.double_quant else 0.0
        return scales * _half_gap(_levels(self.kind)) + rounding


@op
def dequantize_4bit(
    indices: Tensor,
    absmax: Tensor,
    kind: str,
    dtype: torch.dtype,
    absmax_scale: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """The weight that 4-bit indices stand for: ``level[index] * absmax`` of its block, rounded once to ``dtype``.

    indices: u8 [out, in / 2]    absmax: f32 [out, blocks], or u8 with scale and offset  ->  [out, in]
    """
    rows, columns = indices.shape[0], 2 * indices.shape[1]
    if not has_data(indices):
        return indices.new_empty((rows, columns), dtype=dtype)
    block = columns // absmax.shape[1]
    scales = block_scales(absmax, absmax_scale, absmax_offset)
    if block > 1024 and not scales.is_cuda:  # bitsandbytes would compile a slow path for these, several seconds a shape
        scales, block = scales.repeat_interleave(block // 1024, dim=1), 1024
    made = dtype if dtype.itemsize <= 4 else torch.float32
    dense: Tensor = kernels().dequantize_4bit.default(indices, scales.reshape(-1), block, kind, (rows, columns), made)
    return dense.to(dtype)


def _compress(absmax: Tensor) -> dict[str, Tensor]:
    """Double quantization, in the steps and the order of bitsandbytes so that the bytes are the same."""
    if not has_data(absmax):
        scales = absmax.new_empty(ceil(absmax.numel() / NESTED_BLOCK))
        return {"absmax": absmax.to(torch.uint8), "absmax_scale": scales, "absmax_offset": absmax.new_empty(())}
    flat = absmax.reshape(-1)
    offset = flat.mean()
    code = _dynamic_map(absmax.device)
    packed, scales = kernels().quantize_blockwise.default(flat - offset, code, NESTED_BLOCK)
    return {"absmax": packed.view(absmax.shape), "absmax_scale": scales, "absmax_offset": offset}


def block_scales(absmax: Tensor, scale: Tensor | None, offset: Tensor | None) -> Tensor:
    """Each block's largest magnitude, f32 [out, blocks]."""
    if scale is None or offset is None:
        return absmax
    code = _dynamic_map(absmax.device)
    scales: Tensor = kernels().dequantize_blockwise.default(absmax, scale, code, NESTED_BLOCK, torch.float32)
    return scales.add_(offset)


@cache
def _dynamic_map(device: torch.device | None = None) -> Tensor:
    """The 256 levels of 8-bit double quantization."""
    from bitsandbytes.functional import create_dynamic_map

    table: Tensor = create_dynamic_map().to(device or "cpu")
    return table


@cache
def _levels(kind: str) -> Tensor:
    """The 16 levels of ``kind``, from -1 to 1."""
    from bitsandbytes.functional import get_4bit_type

    table: Tensor = get_4bit_type(kind, device="cpu")
    return table


@cache
def _bounds() -> Tensor:
    """What lies between two levels of NF4: the lower one is nearer up to here, and here too."""
    levels = _levels("nf4")
    return (levels[:-1] + levels[1:]) / 2


def _half_gap(levels: Tensor) -> float:
    return levels.sort().values.diff().max().item() / 2
