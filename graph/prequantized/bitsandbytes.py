"""bitsandbytes: NF4 and FP4 with their quantization state, and the integers of LLM.int8().

4 bits    weight u8 [n / 2, 1], weight.absmax, weight.quant_state.bitsandbytes__nf4 (JSON in bytes), and nested_absmax
8 bits    weight i8 [out, in], SCB f32 [out]

LLM.int8() also rounds what it multiplies to 8 bits, but for a few columns; that is its kernel's doing, and not read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from graph.errors import QcError
from graph.formats.four_bit import NESTED_BLOCK, FourBit
from graph.formats.int8 import Int8
from graph.prequantized.base import FULL, Held, Stores, expected, modules
from graph.weights import Stored

_STATE = ".weight.quant_state.bitsandbytes__"


def held(config: Mapping[str, Any], tensors: Stores) -> dict[str, Held]:
    """The packed weights by the keys that they have."""
    found = {f"{module}.weight": _eight_bits(module, tensors) for module in modules(tensors, ".SCB")}
    for key in tensors:
        module, state, kind = key.partition(_STATE)
        if state:
            found[f"{module}.weight"] = _four_bits(module, kind, tensors[key], tensors)
    return found


def _eight_bits(module: str, tensors: Stores) -> Held:
    codes, scale = expected(tensors, f"{module}.weight"), tensors[f"{module}.SCB"]
    layout = tensors.get(f"{module}.weight_format")
    if layout is not None and int(layout.load()) != 0:
        raise QcError(f"{module}.weight is stored in the order of a GPU's tiles, which qc does not read", fix=FULL)
    rows, columns = codes.shape
    return Held((rows, columns), Int8(), lambda: {"indices": codes.load(), "scale": scale.load().float().reshape(rows)})


def _four_bits(module: str, kind: str, state: Stored, tensors: Stores) -> Held:
    try:
        said = json.loads(bytes(state.load().tolist()))
        shape, block, nested = said["shape"], int(said["blocksize"]), "nested_blocksize" in said
        rows, columns = (int(size) for size in shape)
    except (ValueError, KeyError, TypeError):
        raise QcError(f"{state.key} cannot be read", fix="fetch the checkpoint again") from None
    if kind not in ("nf4", "fp4") or said.get("quant_type", kind) != kind:
        raise QcError(f"{module}.weight holds {kind}, which qc does not read", fix=FULL)
    if nested and int(said["nested_blocksize"]) != NESTED_BLOCK:
        what = f"{module}.weight has {said['nested_blocksize']} scales under one, and {NESTED_BLOCK} are read"
        raise QcError(what, fix=FULL)
    form = FourBit("nf4" if kind == "nf4" else "fp4", block, nested)
    offset = float(said.get("nested_offset", 0.0))
    return Held((rows, columns), form, partial(_load, module, tensors, form, (rows, columns), offset))


def _load(module: str, tensors: Stores, form: FourBit, shape: tuple[int, int], offset: float) -> dict[str, Tensor]:
    rows, columns = shape
    absmax = expected(tensors, f"{module}.weight.absmax").load().reshape(rows, columns // form.block)
    found = {"indices": expected(tensors, f"{module}.weight").load().reshape(rows, columns // 2), "absmax": absmax}
    if not form.double_quant:
        return found | {"absmax": absmax.float()}
    nested = expected(tensors, f"{module}.weight.nested_absmax").load().float()
    return found | {"absmax_scale": nested, "absmax_offset": torch.tensor(offset)}
