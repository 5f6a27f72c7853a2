"""FP8 in blocks, as transformers writes it itself: weight e4m3 [out, in], weight_scale_inv [out / 128, in / 128].

On a GPU that has FP8 units its kernel rounds what linears read as well; elsewhere transformers leaves it, and so do we.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from graph.formats.scaled import Scaled
from graph.prequantized.base import Held, Stores, expected, modules
from graph.weights import Stored


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
    form = Scaled("fp8", rows_of, columns_of, scale.dtype)
    return Held((rows, columns), form, partial(_load, codes, scale))


def _load(codes: Stored, scale: Stored) -> dict[str, Tensor]:
    by = scale.load()
    return {"indices": codes.load().view(torch.uint8), "scale": by.reshape(1, 1) if by.dim() < 2 else by}
