"""Integers with a zero point, as GPTQ and AWQ write them: ``W = (code - zero) * scale`` of its group of columns.

Groups are columns behind one another, or any: GPTQ quantizes columns in the order of what they matter, and keeps the
group of each. Models are read in this format; what has no zero points is a format of ``scaled.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from graph.errors import QcError
from graph.formats.bits import pack_bits, packed_columns, unpack_bits
from graph.formats.format import Call, Rows, V, has_data
from graph.formats.scales_of import small_chunks
from graph.ops import op

WIDTHS = (2, 3, 4, 8)
"""The bits of an integer."""


@dataclass(frozen=True)
class Affine:
    """Integers of so many bits: ``indices`` u8 [out, in * bits / 8], ``scale`` and ``zero``, u8, [out, groups].

    With ``scattered`` groups, ``group`` i32 [in] has that of each column.
    """

    parameters: ClassVar[tuple[str, ...]] = ()

    bits: int = 4
    columns: int = 0
    """Columns that share a scale and a zero; 0: all."""

    scale_dtype: torch.dtype = torch.float16
    scattered: bool = False

    def __post_init__(self) -> None:
        assert self.bits in WIDTHS, str(self)

    @property
    def name(self) -> str:
        apart = f"blocks of {self.columns}" if self.columns else "one scale a row"
        return f"{'scattered ' if self.scattered else ''}int{self.bits} with zeros, {apart}"

    def problem(self, name: str, shape: tuple[int, ...]) -> QcError | None:
        """Groups may not run over the end of a row, nor may a row end within a byte."""
        fix = "take the model before it was quantized"
        if len(shape) != 2:
            return QcError(f"{name} has the shape {list(shape)}; {self.name} packs weights of two dimensions", fix=fix)
        if self.columns and shape[1] % self.columns:
            return QcError(f"{self.name}: {self.columns} does not divide the {shape[1]} columns of {name}", fix=fix)
        if shape[1] * self.bits % 8:
            what = f"a row of {name} has {shape[1]} weights, which in {self.name} fill no whole number of bytes"
            return QcError(what, fix=fix)
        return None

    def pack(self, w: Tensor) -> dict[str, Tensor]:
        """From the least to the largest of every group, 0 among them; w: [out, in], float  ->  the side tensors."""
        assert self.problem("the weight", tuple(w.shape)) is None, "see problem()"
        groups = w.shape[1] // (self.columns or w.shape[1])
        indices = w.new_empty((w.shape[0], packed_columns(w.shape[1], self.bits)), dtype=torch.uint8)
        scale = w.new_empty((w.shape[0], groups), dtype=self.scale_dtype)
        zero = w.new_empty((w.shape[0], groups), dtype=torch.uint8)
        for part in small_chunks(*w.shape) if has_data(w) else ():
            indices[part], scale[part], zero[part] = self._rows(w[part].detach().float().unflatten(1, (groups, -1)))
        found = {"indices": indices, "scale": scale, "zero": zero}
        where = torch.arange(w.shape[1], dtype=torch.int32, device=w.device) // (self.columns or w.shape[1])
        return found | ({"group": where} if self.scattered else {})

    def _rows(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The codes, scales and zeros of f32 [rows, groups, columns]."""
        most = (1 << self.bits) - 1
        low, high = values.amin(-1).clamp_(max=0), values.amax(-1).clamp_(min=0)
        scale = ((high - low) / most).to(self.scale_dtype)
        scale = scale.masked_fill(scale == 0, torch.finfo(self.scale_dtype).eps)
        zero = (-low / scale.float()).round_().clamp_(0, most)
        codes = ((values / scale.float()[..., None]).round_() + zero[..., None]).clamp_(0, most)
        return pack_bits(codes.flatten(1).to(torch.uint8), self.bits), scale, zero.to(torch.uint8)

    def call(self, packed: Mapping[str, V], dtype: torch.dtype) -> Call:
        """``qc.dequantize_affine`` and its arguments."""
        rest = {"group": packed["group"]} if "group" in packed else {}
        return dequantize_affine, (packed["indices"], packed["scale"], packed["zero"], self.bits, dtype), rest

    def by_row(self, packed: Mapping[str, Tensor]) -> Rows:
        """They are by row already, but for the groups of columns."""
        whole = {key: side for key, side in packed.items() if key == "group"}
        return lambda part: {key: packed[key][part] for key in ("indices", "scale", "zero")} | whole

    def widest_error(self, w: Tensor, packed: Mapping[str, Tensor], largest: float) -> Tensor:
        """Half a step, as much again for the rounding of the zero, and what rounding the scale comes to."""
        step = packed["scale"].float()
        if self.scattered:
            step = step.amax(1, keepdim=True)
        return step * (1.0 + (1 << self.bits) * torch.finfo(self.scale_dtype).eps)


def format_of_affine(indices: Tensor, scale: Tensor, bits: int, scattered: bool) -> Affine:
    """The format that such side tensors have."""
    inputs, groups = indices.shape[1] * 8 // bits, scale.shape[1]
    return Affine(bits, 0 if groups == 1 else inputs // groups, scale.dtype, scattered)


@op
def dequantize_affine(
    indices: Tensor, scale: Tensor, zero: Tensor, bits: int, dtype: torch.dtype, group: Tensor | None = None
) -> Tensor:
    """The weight that integers and zeros stand for: ``(code - zero) * scale`` in fp32, rounded once to ``dtype``.

    indices: u8 [out, in * bits / 8]    scale: [out, groups]    zero: u8 [out, groups]    group: i32 [in]
    ->  [out, in]
    """
    rows, columns = indices.shape[0], indices.shape[1] * 8 // bits
    dense = indices.new_empty((rows, columns), dtype=dtype)
    for part in small_chunks(rows, columns) if has_data(indices) else ():
        values, by, zeros = unpack_bits(indices[part], bits, columns).float(), scale[part].float(), zero[part].float()
        if group is not None:
            where = group.long()
            dense[part] = values.sub_(zeros[:, where]).mul_(by[:, where])
        else:
            apart = values.unflatten(1, (by.shape[1], -1))
            dense[part] = apart.sub_(zeros[..., None]).mul_(by[..., None]).flatten(1)
    return dense
