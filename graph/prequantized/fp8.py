"""FP8 in blocks, as transformers writes it itself: weight e4m3 [out, in], weight_scale_inv [out / 128, in / 128].

Where that is u8 it holds exponents, for 32 of a row: MXFP8.

On a GPU that has FP8 units its kernel rounds what linears read as well; elsewhere transformers leaves it, and so do we.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from graph.errors import QcError
from graph.formats.scaled import Scaled
from graph.prequantized.base import FULL, Held, Stores, expected, modules
from graph.weights import Stored

_EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)
"""The types of scales that are powers of two."""


def held(config: Mapping[str, Any], tensors: Stores) -> dict[str, Held]:
    """The packed weights by the keys that they have."""
    return {f"{module}.weight": _held(module, tensors) for module in modules(tensors, ".weight_scale_inv")}


def _held(module: str, tensors: Stores) -> Held:
    codes, scale = expected(tensors, f"{module}.weight"), tensors[f"{module}.weight_scale_inv"]
    rows, columns = codes.shape
    blocks = scale.shape if len(scale.shape) == 2 else (1, 1)
    rows_of, columns_of = (
        0 if count == 1 else -(-size // count) for size, count in zip(codes.shape, blocks, strict=True)
    )
    if scale.dtype not in _EXPONENTS:
        return Held((rows, columns), Scaled("fp8", rows_of, columns_of, scale.dtype), partial(_load, codes, scale))
    if tuple(scale.shape) == (rows, columns // 32):
        return Held((rows, columns), Scaled("mxfp8"), partial(_load, codes, scale))
    what = f"the exponents of {module}.weight are {list(scale.shape)}, and qc reads those of 32 of a row"
    raise QcError(what, fix=FULL)


def _load(codes: Stored, scale: Stored) -> dict[str, Tensor]:
    by = scale.load()
    by = by.view(torch.uint8) if by.dtype in _EXPONENTS else by
    return {"indices": codes.load().view(torch.uint8), "scale": by.reshape(1, 1) if by.dim() < 2 else by}
