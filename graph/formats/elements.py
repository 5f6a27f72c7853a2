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

_EXPONENT = 0x7F800000
_ONE, _FOUR = 0x3F800000, 0x40800000
"""The bits of 1.0 and 4.0 in fp32."""

_SHIFT = 22 << 23
"""Added to the exponent of ``x``: a number whose last bit is worth half of ``x``'s power of two."""

_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Element:
    """How one number is written."""

    name: str
    bits: int
    largest: float
    """What the largest magnitude under a scale becomes."""

    half_gap: float
    """Half of the widest step between two numbers."""

    encode: Callable[[Tensor, Tensor], None]
    """Writes f32 [rows, columns], which may be written to, to u8 [rows, columns * bits / 8]; numbers may be beyond
    the largest by what rounding a scale down costs, and none is -0."""

    decode: Callable[[Tensor], Tensor]
    """u8 [rows, columns * bits / 8]  ->  f32 [rows, columns]"""

    nearest: Callable[[Tensor], Tensor]
    """f32  ->  what decoding its code would give, of the same shape"""


def encode_e4m3(x: Tensor) -> Tensor:
    """x: f32 [rows, columns]  ->  u8, a byte each."""
    return x.clamp_(-448.0, 448.0).to(torch.float8_e4m3fn).view(torch.uint8)


def e4m3_into(x: Tensor, out: Tensor) -> None:
    """The same of numbers below 464, which all round to 448 and less, written to ``out``."""
    out.view(torch.float8_e4m3fn).copy_(x)


def decode_e4m3(codes: Tensor) -> Tensor:
    """codes: u8  ->  f32, of the same shape."""
    return codes.view(torch.float8_e4m3fn).float()


def nearest_e4m3(x: Tensor) -> Tensor:
    """The e4m3 number that ``encode_e4m3`` would write for each value, f32 as ``x``."""
    return x.clamp_(-448.0, 448.0).to(torch.float8_e4m3fn).float()


def encode_e2m1(x: Tensor) -> Tensor:
    """x: f32 [rows, columns], columns even  ->  u8 [rows, columns / 2].

    A zero has no sign unless it was rounded to.
    """
    out = torch.empty((x.shape[0], x.shape[1] // 2), dtype=torch.uint8, device=x.device)
    e2m1_into(x.clamp_(-8.0, 8.0).add_(0.0), out)  # -0 becomes 0
    return out


def e2m1_into(x: Tensor, out: Tensor) -> None:
    """The same of numbers below 500, without -0, written to ``out``.

    Between two powers of two the levels are evenly spaced, by half of the lower power; below 1 by a half as well. So
    adding ``2^(e + 22)`` rounds a number of exponent ``e`` to its level, and leaves it in the low bits, counted in
    steps; with two more for every power of two these are the codes. Words are little-endian, as on all machines torch
    runs on: the low byte of a word is its first, the sign is in its last.
    """
    magnitude = scratch("e2m1.magnitude", tuple(x.shape), torch.float32, x.device)
    power = scratch("e2m1.power", tuple(x.shape), torch.int32, x.device)
    codes = scratch("e2m1.codes", tuple(x.shape), torch.uint8, x.device)
    steps = scratch("e2m1.steps", tuple(x.shape), torch.uint8, x.device)
    torch.abs(x, out=magnitude)
    torch.clamp(magnitude.view(torch.int32), _ONE, _FOUR, out=power)
    power.bitwise_and_(_EXPONENT).add_(_SHIFT)
    codes.copy_(magnitude.add_(power.view(torch.float32)).view(torch.int32))
    steps.copy_(power.bitwise_right_shift_(22))
    codes.add_(steps).sub_(2 * (127 + 22) % 256).clamp_(max=7)
    torch.bitwise_and(x.view(torch.uint8)[:, 3::4], 0x80, out=steps)
    codes.bitwise_or_(steps.bitwise_right_shift_(4))
    pairs = codes.view(torch.int16)
    out.copy_(pairs.bitwise_or_(pairs >> 4))


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
    out = torch.empty((x.shape[0], x.shape[1] * bits // 8), dtype=torch.uint8, device=x.device)
    integers_into(x.clamp_(-half, half - 1), out, bits)
    return out


def integers_into(x: Tensor, out: Tensor, bits: int) -> None:
    """The same of numbers less than one beyond the integers, written to ``out``.

    Adding ``1.5 * 2^23`` rounds to an integer, and leaves it in the low bits.
    """
    half = 1 << bits - 1
    codes = scratch("integers.codes", tuple(x.shape), torch.uint8, x.device) if bits != 8 else out
    shift = 1.5 * 2**23 + half
    if bits == 8:
        x.clamp_(-half, half - 1)  # a byte has no room for what is beyond
    codes.copy_(x.add_(shift).view(torch.int32))
    if bits in (2, 4):
        codes.clamp_(max=2 * half - 1)
        _joined(codes, bits, out)
    elif bits != 8:
        out.copy_(pack_bits(codes.clamp_(max=2 * half - 1), bits))


def _joined(codes: Tensor, bits: int, out: Tensor) -> None:
    """Bytes of 2 or 4 codes, by moves over whole words. Words are little-endian, as on all machines torch runs on."""
    pairs = codes.view(torch.int16)
    joined = pairs.bitwise_or_(pairs >> 8 - bits)
    if bits == 2:
        nibbles = joined.to(torch.uint8).view(torch.int16)
        joined = (nibbles & 15).bitwise_or_(nibbles >> 4)
    out.copy_(joined)


def nearest_integers(x: Tensor, bits: int) -> Tensor:
    """The integer that ``encode_integers`` would write for each value, f32 as ``x``."""
    half = 1 << bits - 1
    return x.round_().clamp_(-half, half - 1)


def decode_integers(codes: Tensor, bits: int) -> Tensor:
    """codes: u8 [rows, columns * bits / 8]  ->  f32 [rows, columns]."""
    return unpack_bits(codes, bits, codes.shape[1] * 8 // bits).float().sub_(1 << bits - 1)


def integers(bits: int) -> Element:
    """Integers of so many bits; a scale is the largest magnitude over half of all steps, as in compressed-tensors."""
    encode = partial(integers_into, bits=bits)
    decode, nearest = (partial(function, bits=bits) for function in (decode_integers, nearest_integers))
    return Element(f"int{bits}", bits, (1 << bits) / 2 - 0.5, 0.5, encode, decode, nearest)


E4M3 = Element("e4m3", 8, 448.0, 16.0, e4m3_into, decode_e4m3, nearest_e4m3)
E2M1 = Element("e2m1", 4, 6.0, 1.0, e2m1_into, decode_e2m1, nearest_e2m1)
