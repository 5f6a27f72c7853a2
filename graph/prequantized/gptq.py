"""GPTQ: integers of 2, 3, 4 or 8 bits, scales and zero points by groups of columns (arXiv:2210.17323).

qweight i32 [in * bits / 32, out]    codes, packed down the columns of the weight, low bits first
qzeros  i32 [groups, out * bits / 32]    zeros, packed along its rows, less one (``gptq_v2``: as they are)
scales  [groups, out]    g_idx i32 [in], the group of each column

Where all zeros are half of the range they are none, and the weight is symmetric.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from graph.errors import QcError
from graph.formats.affine import WIDTHS, Affine
from graph.formats.bits import packed_columns, unpack_bits
from graph.formats.scaled import Kind, Scaled
from graph.prequantized.base import FULL, Held, Stores, expected, modules

FORMATS = {"gptq": 1, "gptq_v2": 0}
"""The layouts that are read, and what their zeros lack."""


def held(config: Mapping[str, Any], tensors: Stores) -> dict[str, Held]:
    """The packed weights by the keys that they would have if they were dense."""
    bits, layout = int(config.get("bits", 0)), str(config.get("checkpoint_format") or config.get("format") or "gptq")
    if bits not in WIDTHS:
        raise QcError(f"the weights have {bits} bits, and GPTQ is read in {', '.join(map(str, WIDTHS))}", fix=FULL)
    if layout not in FORMATS:
        raise QcError(f"the weights lie in the layout {layout}, and GPTQ is read in {' and '.join(FORMATS)}", fix=FULL)
    return {f"{m}.weight": _held(m, bits, FORMATS[layout], tensors) for m in modules(tensors, ".qweight")}


def _held(module: str, bits: int, lacking: int, tensors: Stores) -> Held:
    codes, scales = tensors[f"{module}.qweight"], expected(tensors, f"{module}.scales")
    (words, rows), groups = codes.shape, scales.shape[0]
    columns = words * 32 // bits
    zero = _zeros(module, bits, lacking, rows, tensors)
    where = tensors.get(f"{module}.g_idx")
    group = where.load().to(torch.int32) if where is not None else None
    size = 0 if groups == 1 else -(-columns // groups)
    if group is not None and torch.equal(group, torch.arange(columns, dtype=torch.int32) // (size or columns)):
        group = None
    plain = group is None and bool((zero == 1 << bits - 1).all())
    form = (
        Scaled(cast(Kind, f"int{bits}"), 1, size, scales.dtype)
        if plain
        else Affine(bits, size, scales.dtype, group is not None)
    )
    return Held((rows, columns), form, partial(_load, module, bits, tensors, None if plain else zero, group))


def _zeros(module: str, bits: int, lacking: int, rows: int, tensors: Stores) -> Tensor:
    """u8 [out, groups]."""
    packed = expected(tensors, f"{module}.qzeros").load().view(torch.uint8)
    found = unpack_bits(packed[:, : packed_columns(rows, bits)].contiguous(), bits, rows).t().contiguous()
    return (found + lacking) & 0xFF if lacking else found


def _load(module: str, bits: int, tensors: Stores, zero: Tensor | None, group: Tensor | None) -> dict[str, Tensor]:
    words = expected(tensors, f"{module}.qweight").load().t().contiguous()
    indices = words.view(torch.uint8)  # a little-endian stream of bits down the columns, as ours is
    found = {"indices": indices, "scale": expected(tensors, f"{module}.scales").load().t().contiguous()}
    if zero is not None:
        found["zero"] = zero
    return found | ({"group": group} if group is not None else {})
