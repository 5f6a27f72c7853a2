"""The bytes of GGUF's encodings: what shares a scale lies together with it, row by row.

TQ2_0  2.06 bits   64 bytes of 256 trits, fp16         TQ1_0  1.69 bits   52 bytes of 256 trits, fp16
Q8_0   8.5 bits    fp16, 32 bytes of 32 integers       Q4_0   4.5 bits    fp16, 16 bytes of 32 integers
MXFP4  4.25 bits   an exponent, 16 bytes of 32 e2m1
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BLOCK = 256
"""Values of a row that ternary encodings hold together."""

GROUP = 32
"""Values of a row that the encodings of integers hold together."""


def q8_0(codes: NDArray[np.uint8], scales: NDArray[np.float16]) -> NDArray[np.uint8]:
    """codes: u8 [rows, columns], 128 added    scales: f16 [rows, columns / 32]  ->  u8 [rows, columns / 32 * 34]."""
    return _behind_scales((codes ^ np.uint8(0x80)).reshape(*scales.shape, GROUP), scales)


def q4_0(codes: NDArray[np.uint8], scales: NDArray[np.float16]) -> NDArray[np.uint8]:
    """Of 32 values, those 16 apart share a byte, the first in its low half.

    codes: u8 [rows, columns / 2], 8 added, neighbours in a byte, the first in its low half
    scales: f16 [rows, columns / 32]  ->  u8 [rows, columns / 32 * 18]
    """
    return _behind_scales(_sixteen_apart(codes, scales.shape), scales)


def mxfp4(codes: NDArray[np.uint8], exponents: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Of 32 values, those 16 apart share a byte, the first in its low half.

    codes: u8 [rows, columns / 2], e2m1, neighbours in a byte, the first in its low half
    exponents: u8 [rows, columns / 32], 127 added  ->  u8 [rows, columns / 32 * 17]
    """
    packed = _sixteen_apart(codes, exponents.shape)
    return np.concatenate([exponents[..., None], packed], axis=-1).reshape(codes.shape[0], -1)


def _sixteen_apart(codes: NDArray[np.uint8], groups: tuple[int, ...]) -> NDArray[np.uint8]:
    """Two in a byte that were neighbours  ->  u8 [*groups, 16]."""
    halves = codes.reshape(*groups, 2, GROUP // 4)
    first, last = halves[..., 0, :], halves[..., 1, :]
    even, odd = first & 15 | last << 4, first >> 4 | last & 0xF0
    return np.stack([even, odd], axis=-1).reshape(*groups, GROUP // 2)


def tq2_0(trits: NDArray[np.uint8], scales: NDArray[np.float16]) -> NDArray[np.uint8]:
    """Two bits each, 2.06 with their scale.

    trits: u8 [rows, columns], 0 to 2    scales: f16 [rows, columns / 256]  ->  u8 [rows, columns / 256 * 66]

    Of 128 values in a row, those 32 apart share a byte, the first in its lowest bits.
    """
    parts = trits.reshape(trits.shape[0], -1, 2, 4, 32)
    packed = parts[..., 0, :] | parts[..., 1, :] << 2 | parts[..., 2, :] << 4 | parts[..., 3, :] << 6
    return _before_scales(packed.reshape(*scales.shape, 64).astype(np.uint8), scales)


def tq1_0(trits: NDArray[np.uint8], scales: NDArray[np.float16]) -> NDArray[np.uint8]:
    """Five values a byte, 1.69 bits each with their scale.

    trits: u8 [rows, columns], 0 to 2    scales: f16 [rows, columns / 256]  ->  u8 [rows, columns / 256 * 54]

    A byte is a number of five digits to the base 3, the first the highest, times 256 / 243 and rounded up: a reader
    multiplies by 3 and takes what leaves the byte, digit by digit. 160 values lie 32 apart in 32 bytes, 80 lie 16 apart
    in 16, and the last 16 lie 4 apart in 4 bytes, of four digits and a zero.
    """
    blocks = trits.reshape(*scales.shape, BLOCK).astype(np.uint16)
    found = []
    for begin, end, apart in ((0, 160, 32), (160, 240, 16), (240, 256, 4)):
        digits = blocks[..., begin:end].reshape(*scales.shape, -1, apart)
        weights = np.array([81, 27, 9, 3, 1], np.uint16)[: digits.shape[-2], None]
        found.append((digits * weights).sum(axis=-2, dtype=np.uint16))
    number = np.concatenate(found, axis=-1)
    return _before_scales(((number * np.uint16(256) + np.uint16(242)) // np.uint16(243)).astype(np.uint8), scales)


def _before_scales(packed: NDArray[np.uint8], scales: NDArray[np.float16]) -> NDArray[np.uint8]:
    return np.concatenate([packed, _bytes(scales)], axis=-1).reshape(packed.shape[0], -1)


def _behind_scales(packed: NDArray[np.uint8], scales: NDArray[np.float16]) -> NDArray[np.uint8]:
    return np.concatenate([_bytes(scales), packed], axis=-1).reshape(packed.shape[0], -1)


def _bytes(scales: NDArray[np.float16]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(scales)[..., None].astype("<f2").view(np.uint8)
