"""Indices of 1, 2, 3, 4, 6 or 8 bits in bytes: each row a little-endian bit stream, padded to a whole byte.

Index ``j`` of a row occupies its bits ``j * bits`` to ``j * bits + bits - 1``, the low bits of a byte first. So two
rows never share a byte, and any rows of a packed matrix are a packed matrix.

A *word* is what is unpacked at once: a byte, or 12 bits where 3 or 6 bits do not divide a byte. A table from every
word to the values in it, read through wide elements, unpacks several times faster than shifts.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from graph.formats.format import chunks, has_data

BITS = (1, 2, 3, 4, 6, 8)
"""The widths that indices are packed in."""

_WIDE = {1: torch.float32, 2: torch.float64, 4: torch.complex128}
"""The type of one element as wide as so many fp32 numbers; gathering those is one move each."""


def bits_for(levels: int) -> int:
    """The bits of an index into so many levels."""
    assert 2 <= levels <= 256, f"{levels} levels"
    return next(bits for bits in BITS if 1 << bits >= levels)


def packed_columns(columns: int, bits: int) -> int:
    """The bytes of a row of so many indices."""
    return -(-columns * bits // 8)


def pack_bits(indices: Tensor, bits: int) -> Tensor:
    """Pack a matrix of indices.

    indices: u8 [out, in], each below ``2 ** bits``  ->  u8 [out, ceil(in * bits / 8)]
    """
    assert indices.dtype == torch.uint8 and bits in BITS, f"{bits}-bit {indices.dtype}"
    packed = indices.new_empty((indices.shape[0], packed_columns(indices.shape[1], bits)))
    if bits == 8:
        return packed.copy_(indices)
    for part in chunks(indices) if has_data(indices) else ():
        packed[part] = _bytes(_padded(indices[part], 24 // bits), bits)[:, : packed.shape[1]]
    return packed


def _bytes(indices: Tensor, bits: int) -> Tensor:
    """The bytes of rows whose length is a multiple of three bytes."""
    if bits in (3, 6):
        words = _joined(indices, bits, 24 // bits, torch.int32)
        parts = [(words >> shift & 255).to(torch.uint8) for shift in (0, 8, 16)]
        return torch.stack(parts, dim=-1).flatten(1)
    return _joined(indices, bits, 8 // bits, torch.uint8)


def _joined(indices: Tensor, bits: int, count: int, dtype: torch.dtype) -> Tensor:
    """Every ``count`` indices in one number, the first in its low bits."""
    groups = indices.unflatten(1, (-1, count)).to(dtype)
    words = groups[..., 0].clone()
    for k in range(1, count):
        words |= groups[..., k] << bits * k
    return words


def unpack_bits(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The indices of a packed matrix.

    packed: u8 [out, ceil(columns * bits / 8)]  ->  u8 [out, columns]
    """
    _expect(packed, bits, columns)
    indices = packed.new_empty((packed.shape[0], columns))
    if bits == 8:
        return indices.copy_(packed)
    for part in chunks(indices) if has_data(packed) else ():
        words = _words(packed[part], bits)
        per_word = _per_word(bits)
        made = words.new_empty((*words.shape, per_word), dtype=torch.uint8)
        for k in range(per_word):
            made[..., k] = words >> bits * k & (1 << bits) - 1
        indices[part] = made.flatten(1)[:, :columns]
    return indices


def look_up(packed: Tensor, levels: Tensor, columns: int) -> Tensor:
    """The level that each packed index stands for.

    packed: u8 [out, ceil(columns * bits / 8)]    levels: f32 [N], or [groups, N]: as many rows share each of the
    groups  ->  f32 [out, columns]; the bits of an index follow from N
    """
    values = levels.new_empty((packed.shape[0], columns), dtype=torch.float32)
    if has_data(packed):
        read = Reader(packed, levels, columns)
        for part in chunks(values):
            read(part, values[part])
    return values


class Reader:
    """Looks up rows of packed indices; the table is made once."""

    def __init__(self, packed: Tensor, levels: Tensor, columns: int):
        self.bits = bits_for(levels.shape[-1])
        _expect(packed, self.bits, columns)
        self.packed, self.columns = packed, columns
        self.levels, self.share = levels.float(), packed.shape[0]
        if levels.dim() == 2:
            self.share = packed.shape[0] // levels.shape[0]
        elif has_data(levels):  # a table of a fake tensor would be kept for the real ones
            self.table = _table(self.levels, self.bits)

    def __call__(self, rows: slice, out: Tensor) -> Tensor:
        """The levels of these rows, written to ``out``, f32 [rows, columns] and contiguous."""
        if self.levels.dim() == 2:
            indices = self.codes(rows).int() + self._start(rows)
            torch.index_select(self.levels.reshape(-1), 0, indices.view(-1), out=out.view(-1))
            return out
        words = _words(self.packed[rows], self.bits)
        if words.shape[1] * _per_word(self.bits) == self.columns:
            torch.index_select(self.table, 0, words.view(-1), out=out.view(-1).view(self.table.dtype))
            return out
        found = self.table.index_select(0, words.view(-1)).view(torch.float32)
        return out.copy_(found.view(words.shape[0], -1)[:, : self.columns])

    def codes(self, rows: slice) -> Tensor:
        """The indices of these rows, u8 [rows, columns]."""
        return unpack_bits(self.packed[rows], self.bits, self.columns)

    def _start(self, rows: slice) -> Tensor:
        """Where the levels of each row begin in all levels behind one another."""
        numbers = torch.arange(rows.start, rows.stop, dtype=torch.int32, device=self.packed.device)
        return (numbers // self.share * self.levels.shape[1])[:, None]


def _per_word(bits: int) -> int:
    return (12 if bits in (3, 6) else 4 if bits == 1 else 8) // bits


def _words(packed: Tensor, bits: int) -> Tensor:
    """The words of each row, i32 [out, words]; the last may run over the end of the row."""
    if bits in (3, 6):
        low, middle, high = _padded(packed, 3).unflatten(1, (-1, 3)).int().unbind(-1)
        return torch.stack((low | (middle & 15) << 8, middle >> 4 | high << 4), dim=-1).flatten(1)
    if bits == 1:
        return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1).int()
    return packed.int()


def _table(levels: Tensor, bits: int) -> Tensor:
    """For every word the levels of its indices, as one wide element."""
    indices = _indices_of_words(bits, levels.shape[0], levels.device)
    return levels.index_select(0, indices).view(_WIDE[_per_word(bits)])


@cache
def _indices_of_words(bits: int, levels: int, device: torch.device) -> Tensor:
    """The indices in word 0, in word 1 and so on; those that no level has are of the last."""
    per_word = _per_word(bits)
    words = torch.arange(1 << bits * per_word, device=device)
    indices = torch.stack([words >> bits * k & (1 << bits) - 1 for k in range(per_word)], dim=1)
    return indices.clamp_(max=levels - 1).view(-1)


def _padded(x: Tensor, multiple: int) -> Tensor:
    """Zero columns up to a multiple."""
    short = -x.shape[1] % multiple
    return torch.nn.functional.pad(x, (0, short)) if short else x


def _expect(packed: Tensor, bits: int, columns: int) -> None:
    assert packed.dtype == torch.uint8 and bits in BITS, f"{bits}-bit {packed.dtype}"
    width = packed_columns(columns, bits)
    assert packed.shape[1] == width, f"a row of {columns} {bits}-bit indices has {width} bytes, not {packed.shape[1]}"
