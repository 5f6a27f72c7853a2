"""The tensors of a packed weight in a checkpoint, under the names that each dialect gives them.

compressed-tensors   weight or weight_packed, weight_scale, weight_global_scale (a divisor), weight_shape
modelopt             weight, weight_scale, weight_scale_2 (a factor), input_scale (a factor)
hf                   weight, weight_scale_inv (a factor, despite its name; of MXFP8 exponents, u8)
bitsandbytes         weight [n / 2, 1], weight.absmax, weight.quant_map, weight.quant_state.bitsandbytes__nf4

All but the last take the same bytes; only names, shapes and which way round a global scale is differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graph.formats import Format, FourBit, Scaled, Ternary
from graph.formats.scaled import ELEMENTS
from graph.formats.scales_of import float_scales, global_scale
from runtimes.serving import ternary
from runtimes.serving.settings import Serving

E4M3 = torch.float8_e4m3fn


def checkpoint_tensors(
    form: Format, sides: Mapping[str, Tensor], shape: tuple[int, int], settings: Serving, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of one weight, by what follows the name of its linear; ``sides`` may have no values.

    ``dtype`` is that in which the model computes, of which bitsandbytes keeps note.
    """
    if isinstance(form, FourBit):
        return _bitsandbytes(form, sides, shape, dtype)
    if isinstance(form, Ternary):
        found = ternary.tensors(form, sides)
        return _stream(found["codes"], found["scale"], shape)
    assert isinstance(form, Scaled)
    if settings.dialect == "compressed-tensors":
        return _compressed(form, sides, shape, settings)
    return _modelopt(form, sides) if settings.dialect == "modelopt" else _hf(sides)


def _compressed(
    form: Scaled, sides: Mapping[str, Tensor], shape: tuple[int, int], settings: Serving
) -> dict[str, Tensor]:
    codes, scale = sides["indices"], sides["scale"]
    if form.kind in ("fp8", "mxfp8"):
        whole = scale.reshape(1) if form.rows == 0 else scale
        return {"weight": codes.view(E4M3), "weight_scale": whole}
    if form.kind == "nvfp4":
        globals_ = {"weight_global_scale": sides["global_scale"]}
        return {"weight_packed": codes, "weight_scale": scale.view(E4M3), **globals_}
    if form.kind == "mxfp4":
        return {"weight_packed": codes, "weight_scale": scale}
    if form.kind == "int8" and settings.inputs is not None:
        return {"weight": signed(codes), "weight_scale": scale}
    return _stream(codes, scale, shape)


def _stream(codes: Tensor, scale: Tensor, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Integers one after the other, however many bits each has."""
    where = torch.tensor(shape) if not codes.is_meta else torch.empty(2, dtype=torch.int64, device="meta")
    return {"weight_packed": words(codes), "weight_scale": scale, "weight_shape": where}


def signed(codes: Tensor) -> Tensor:
    """Bytes with 128 added  ->  i8."""
    return codes.bitwise_xor(0x80).view(torch.int8)


def words(codes: Tensor) -> Tensor:
    """Rows of bytes  ->  rows of i32, the last one filled up with zeros."""
    missing = -codes.shape[1] % 4
    whole = torch.nn.functional.pad(codes, (0, missing)) if missing else codes
    return whole.contiguous().view(torch.int32)


def _modelopt(form: Scaled, sides: Mapping[str, Tensor]) -> dict[str, Tensor]:
    codes, scale = sides["indices"], sides["scale"]
    if form.kind == "nvfp4":
        factor = 1.0 / sides["global_scale"].reshape(())
        return {"weight": codes, "weight_scale": scale.view(E4M3), "weight_scale_2": factor}
    if form.kind == "mxfp8":
        return {"weight": codes.view(E4M3), "weight_scale": scale}
    if form.rows == 0:
        return {"weight": codes.view(E4M3), "weight_scale": scale.reshape(())}
    if form.rows == 1:
        return {"weight": codes.view(E4M3), "weight_scale": scale.reshape(-1)}
    return {"weight": codes.view(E4M3), "weight_scale": scale[:, None, :, None]}


def _hf(sides: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"weight": sides["indices"].view(E4M3), "weight_scale_inv": sides["scale"]}


def input_tensors(settings: Serving, largest: float) -> dict[str, Tensor]:
    """What a checkpoint says of an input whose largest magnitude is known; nothing where inputs are not calibrated."""
    if not settings.calibrated:
        return {}
    if settings.target == "nvfp4":
        divisor = global_scale(torch.tensor(largest))
        modelopt = settings.dialect == "modelopt"
        return {"input_scale": 1.0 / divisor.reshape(())} if modelopt else {"input_global_scale": divisor}
    factor = float_scales(torch.tensor([largest]), ELEMENTS["fp8"], torch.float32)
    return {"input_scale": factor.reshape(()) if settings.dialect == "modelopt" else factor}


def cache_scale(largest: float, dtype: torch.dtype) -> Tensor:
    """What keys or values of that largest magnitude are divided by, [1]; ``dtype`` is that of the model."""
    return float_scales(torch.tensor([largest]), ELEMENTS["fp8"], dtype)


def cache_tensors(
    attention: str, largest: tuple[float, float], settings: Serving, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The scales of keys and values that an attention keeps, by their names in a checkpoint."""
    modelopt = settings.dialect == "modelopt"
    found = {}
    for which, seen in zip("kv", largest, strict=True):
        scale = cache_scale(seen, torch.float32 if modelopt else dtype)
        name = f"{attention}.{which}_proj.{which}_scale" if modelopt else f"{attention}.{which}_scale"
        found[name] = scale.reshape(()) if modelopt else scale
    return found


def _bitsandbytes(
    form: FourBit, sides: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """As bitsandbytes' own QuantState says it."""
    from bitsandbytes import functional

    library: Any = functional  # without types

    values = {key: _zeros(side) if side.is_meta else side for key, side in sides.items()}
    nested: Any = None
    if form.double_quant:
        nested = library.QuantState(
            absmax=values["absmax_scale"].reshape(-1), blocksize=256, code=library.create_dynamic_map()
        )
    state = library.QuantState(
        absmax=values["absmax"].reshape(-1), shape=torch.Size(shape), code=library.get_4bit_type("nf4", device="cpu"),
        blocksize=form.block, quant_type="nf4", dtype=dtype,
        offset=values["absmax_offset"] if nested is not None else None, state2=nested,
    )  # fmt: skip
    if nested is not None:
        nested.dtype = torch.float32
    found = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    return {"weight": values["indices"].reshape(-1, 1), **found}


def _zeros(planned: Tensor) -> Tensor:
    """A value of that type, where only types are wanted."""
    return torch.zeros(planned.shape, dtype=planned.dtype)
