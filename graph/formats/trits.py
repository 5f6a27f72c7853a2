"""Trits, numbers of 0 to 2, in bytes: four in two bits each, or five as the digits of one number below 243.

Either way a row starts on a byte and its first trit is in the low end of the first byte, so that any rows of a packed
matrix are a packed matrix. Two bits are read faster; five trits a byte come to 1.6 bits each, near the 1.585 of the
information in them.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from graph.formats.bits import pack_bits, unpack_bits
from graph.formats.format import chunks, has_data

Packing = Literal["2bit", "trit5"]

PACKINGS: tuple[Packing, ...] = get_args(Packing)

PER_BYTE: dict[Packing, int] = {"2bit": 4, "trit5": 5}
"""Trits in a byte."""

WORD = 8
"""Bytes of an entry of the table that unpacks five trits: the next number of bytes that is moved as one."""


def trit_bytes(columns: int, packing: Packing) -> int:
    """The bytes of a row of so many trits."""
    return -(-columns // PER_BYTE[packing])


def pack_trits(trits: Tensor, packing: Packing) -> Tensor:
    """Pack a matrix of trits.

    trits: u8 [out, in], each 0, 1 or 2  ->  u8 [out, ceil(in / 4)], or [out, ceil(in / 5)] for trit5
    """
    assert trits.dtype == torch.uint8, f"trits of {trits.dtype}"
    if packing == "2bit":
        return pack_bits(trits, 2)
    packed = trits.new_empty((trits.shape[0], trit_bytes(trits.shape[1], packing)))
    for part in chunks(trits) if has_data(trits) else ():
        digits = torch.nn.functional.pad(trits[part], (0, -trits.shape[1] % 5)).unflatten(1, (-1, 5))
        number = digits[..., 4].clone()
        for place in (3, 2, 1, 0):
            number.mul_(3).add_(digits[..., place])
        packed[part] = number
    return packed


def unpack_trits(packed: Tensor, packing: Packing, columns: int) -> Tensor:
    """The trits of a packed matrix.

    packed: u8 [out, bytes]  ->  u8 [out, columns]
    """
    width = trit_bytes(columns, packing)
    assert packed.shape[1] == width, f"a row of {columns} trits in {packing} has {width} bytes, not {packed.shape[1]}"
    if packing == "2bit":
        return unpack_bits(packed, 2, columns)
    trits = packed.new_empty((packed.shape[0], columns))
    for part in chunks(trits) if has_data(packed) else ():
        words = _table(packed.device).index_select(0, packed[part].reshape(-1).int())
        digits = words.view(torch.uint8).view(-1, width, WORD)[..., :5]
        trits[part] = digits.flatten(1)[:, :columns]
    return trits


@cache
def _table(device: torch.device) -> Tensor:
    """For every byte its five digits to the base 3 and three bytes of nothing, in one 64-bit number; i64 [256]."""
    numbers = torch.arange(256, device=device)
    digits = torch.zeros((256, WORD), dtype=torch.uint8, device=device)
    for place in range(5):
        digits[:, place] = numbers // 3**place % 3
    return digits.view(torch.int64).view(-1)
