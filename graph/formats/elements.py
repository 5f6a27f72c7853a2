"""The numbers that scaled formats count in: e4m3 and e2m1 floats, and integers of a few bits.

e4m3  1 sign, 4 exponent and 3 mantissa bits, largest 448 (arXiv:2209.05433); a byte each
e2m1  0, 0.5, 1, 1.5, 2, 3, 4 and 6, with a sign (OCP Microscaling Formats 1.0); two a byte, the first in the low half
intN  -2^(N-1) … 2^(N-1) - 1, stored with 2^(N-1) added, as a stream of bits, the low ones first

All round to the nearest, ties to the even code, and saturate. Encoders may write to what they are given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from graph.formats.bits import pack_bits, unpack_bits
from graph.formats.memory import scratch

_EXPONENT, _MAGNITUDE = 0x7F800000, 0x7FFFFFFF
_ONE, _FOUR = 0x3F800000, 0x40800000
"""The bits of 1.0 and 4.0 in fp32."""

_SHIFT = 22 << 23
"""Added to the exponent of ``x``: a number whose last bit is worth half of ``x``'s power of two."""

_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Element:
    """How one number is written."""

    bits: int
    largest: float
    """What the largest magnitude under a scale becomes."""

    half_gap: float
    """Half of the widest step between two numbers."""

    encode: Callable[[Tensor], Tensor]
    """f32 [rows, columns]  ->  u8 [rows, columns * bits / 8]"""

    decode: Callable[[Tensor], Tensor]
    """u8 [rows, columns * bits / 8]  ->  f32 [rows, columns]"""

    nearest: Callable[[Tensor], Tensor]
    """f32  ->  what decoding its code would give, of the same shape"""


def encode_e4m3(x: Tensor) -> Tensor:
    """x: f32 [rows, columns]  ->  u8, a byte each."""
    return x.clamp_(-448.0, 448.0).to(torch.float8_e4m3fn).view(torch.uint8)


def decode_e4m3(codes: Tensor) -> Tensor:
    """codes: u8  ->  f32, of the same shape."""
    return codes.view(torch.float8_e4m3fn).float()


def nearest_e4m3(x: Tensor) -> Tensor:
    """The e4m3 number that ``encode_e4m3`` would write for each value, f32 as ``x``."""
    return x.clamp_(-448.0, 448.0).to(torch.float8_e4m3fn).float()


def encode_e2m1(x: Tensor) -> Tensor:
    """x: f32 [rows, columns], columns even  ->  u8 [rows, columns / 2].

    Between two powers of two the levels are evenly spaced, by half of the lower power; below 1 by a half as well. So
    adding ``2^(e + 22)`` rounds a number of exponent ``e`` to its level, and leaves it in the low bits, counted in
    steps; with two more for every power of two these are the codes. A zero has no sign unless it was rounded to.
    """
    bits = x.add_(0.0).view(torch.int32)  # -0 becomes 0
    magnitude = scratch("e2m1.magnitude", tuple(x.shape), torch.int32, x.device)
    power = scratch("e2m1.power", tuple(x.shape), torch.int32, x.device)
    torch.bitwise_and(bits, _MAGNITUDE, out=magnitude)
    torch.clamp(magnitude, _ONE, _FOUR, out=power)
    power.bitwise_and_(_EXPONENT).add_(_SHIFT)
    rounded = magnitude.view(torch.float32).clamp_(max=8.0).add_(power.view(torch.float32)).view(torch.int32)
    codes = rounded.to(torch.uint8)
    codes += power.bitwise_right_shift_(22).sub_(2 * (127 + 22)).to(torch.uint8)
    codes.clamp_(max=7)
    codes |= bits.bitwise_right_shift_(28).to(torch.uint8) & 8
    pairs = codes.view(torch.int16)
    return (pairs | pairs >> 4).to(torch.uint8)


def nearest_e2m1(x: Tensor) -> Tensor:
    """The level that ``encode_e2m1`` would write for each value, f32 as ``x``."""
    magnitude = x.abs().clamp_(max=6.0)
    power = magnitude.clamp(1.0, 4.0).view(torch.int32).bitwise_and_(_EXPONENT).view(torch.float32)
    return (magnitude / power).mul_(2.0).round_().mul_(power).mul_(0.5).copysign_(x)


def decode_e2m1(codes: Tensor) -> Tensor:
    """codes: u8 [rows, columns / 2]  ->  f32 [rows, columns]."""
    table = _pairs_of_bytes(codes.device)
    found = table.index_select(0, codes.reshape(-1).int()).view(torch.float32)
    return found.view(codes.shape[0], 2 * codes.shape[1])


@cache
def _pairs_of_bytes(device: torch.device) -> Tensor:
    """For every byte the two levels in it, as one fp64 element: gathering that is one move."""
    levels = torch.tensor([*_LEVELS, *(-level for level in _LEVELS)], device=device)
    codes = torch.arange(256, device=device)
    return torch.stack((levels[codes & 15], levels[codes >> 4]), dim=1).view(torch.float64).view(-1)


def encode_integers(x: Tensor, bits: int) -> Tensor:
    """x: f32 [rows, columns]  ->  u8 [rows, columns * bits / 8]."""
    half = 1 << bits - 1
    codes = x.round_().clamp_(-half, half - 1).add_(half).to(torch.uint8)
    return _joined(codes, bits) if bits in (2, 4) else pack_bits(codes, bits)


def _joined(codes: Tensor, bits: int) -> Tensor:
    """Bytes of 2 or 4 codes, by moves over whole words. Words are little-endian, as on all machines torch runs on."""
    pairs = codes.view(torch.int16)
    joined = pairs | pairs >> 8 - bits
    if bits == 2:
        nibbles = joined.to(torch.uint8).view(torch.int16)
        joined = nibbles & 15 | nibbles >> 4
    return joined.to(torch.uint8)


def nearest_integers(x: Tensor, bits: int) -> Tensor:
    """The integer that ``encode_integers`` would write for each value, f32 as ``x``."""
    half = 1 << bits - 1
    return x.round_().clamp_(-half, half - 1)


def decode_integers(codes: Tensor, bits: int) -> Tensor:
    """codes: u8 [rows, columns * bits / 8]  ->  f32 [rows, columns]."""
    return unpack_bits(codes, bits, codes.shape[1] * 8 // bits).float().sub_(1 << bits - 1)


def integers(bits: int) -> Element:
    """Integers of so many bits; a scale is the largest magnitude over half of all steps, as in compressed-tensors."""
    encode, decode, nearest = (
        partial(function, bits=bits) for function in (encode_integers, decode_integers, nearest_integers)
    )
    return Element(bits, (1 << bits) / 2 - 0.5, 0.5, encode, decode, nearest)


E4M3 = Element(8, 448.0, 16.0, encode_e4m3, decode_e4m3, nearest_e4m3)
E2M1 = Element(4, 6.0, 1.0, encode_e2m1, decode_e2m1, nearest_e2m1)
