"""AWQ: integers of 4 bits with zero points, eight outputs a word in an order of their own (arXiv:2306.00978).

qweight i32 [in, out / 8]    qzeros i32 [groups, out / 8]    scales [groups, out]

From its low bits on, a word holds the outputs 0, 2, 4, 6, 1, 3, 5 and 7 of its eight.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from graph.errors import QcError
from graph.formats.affine import Affine
from graph.formats.bits import pack_bits, unpack_bits
from graph.prequantized.base import FULL, Held, Stores, expected, modules

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def held(config: Mapping[str, Any], tensors: Stores) -> dict[str, Held]:
    """The packed weights by the keys that they would have if they were dense."""
    bits, version = (
        config.get("bits", config.get("w_bit")),
        str(config.get("version") or config.get("format") or "gemm"),
    )
    if bits != BITS or version.lower() != "gemm":
        what = f"the weights have {bits} bits in the layout {version}, and AWQ is read in 4 bits in the layout gemm"
        raise QcError(what, fix=FULL)
    return {f"{module}.weight": _held(module, tensors) for module in modules(tensors, ".qweight")}


def _held(module: str, tensors: Stores) -> Held:
    (columns, words), scales = tensors[f"{module}.qweight"].shape, expected(tensors, f"{module}.scales")
    groups = scales.shape[0]
    form = Affine(BITS, 0 if groups == 1 else -(-columns // groups), scales.dtype)
    return Held((words * 8, columns), form, partial(_load, module, tensors))


def _load(module: str, tensors: Stores) -> dict[str, Tensor]:
    codes, zero, scale = (expected(tensors, f"{module}.{name}").load() for name in ("qweight", "qzeros", "scales"))
    return {
        "indices": pack_bits(_in_order(codes).t().contiguous(), BITS),
        "scale": scale.t().contiguous(),
        "zero": _in_order(zero).t().contiguous(),
    }


def _in_order(words: Tensor) -> Tensor:
    """i32 [rows, out / 8]  ->  u8 [rows, out]."""
    nibbles = unpack_bits(words.contiguous().view(torch.uint8), BITS, 8 * words.shape[1]).unflatten(1, (-1, 8))
    found = torch.empty_like(nibbles)
    found[..., list(ORDER)] = nibbles
    return found.flatten(1)
