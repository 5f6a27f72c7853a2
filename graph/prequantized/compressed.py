"""compressed-tensors: packed integers, FP8, NVFP4 and MX, and how what linears read is rounded.

weight_packed i32 or u8, or weight i8 or e4m3; weight_scale, weight_global_scale, weight_zero_point, weight_g_idx;
input_scale and input_global_scale where inputs have a scale known beforehand.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from graph.errors import QcError
from graph.formats.activations import InputKind
from graph.formats.affine import WIDTHS, Affine
from graph.formats.bits import packed_columns, unpack_bits
from graph.formats.format import Format
from graph.formats.scaled import ELEMENTS, FIXED, Kind, Scaled
from graph.prequantized.base import FULL, Held, Inputs, Stores, expected
from graph.weights import Stored

PACKED = ("pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized")
"""The layouts with ``weight_packed``."""

LAYOUTS = (*PACKED, "int-quantized", "float-quantized", "naive-quantized", "mxfp8-quantized")
"""The layouts that are read."""


def held(config: Mapping[str, Any], tensors: Stores) -> dict[str, Held]:
    """The packed weights by the keys that they would have if they were dense."""
    _refuse_what_is_beside(config)
    groups = list(dict(config.get("config_groups") or {}).values())
    if not groups:
        raise QcError("quantization_config has no config_groups", fix="fetch the checkpoint again")
    ending = ".weight_scale"
    found = {}
    for module in (key.removesuffix(ending) for key in tensors if key.endswith(ending)):
        group = _group_of(module, groups)
        found[f"{module}.weight"] = _Weight(module, group, group.get("format") or config.get("format"), tensors).held()
    return found


def _refuse_what_is_beside(config: Mapping[str, Any]) -> None:
    sparse = dict(config.get("sparsity_config") or {}).get("format", "dense")
    if sparse != "dense":
        raise QcError(f"the weights are stored {sparse}, without their zeros, which qc does not read", fix=FULL)
    if config.get("kv_cache_scheme"):
        what = "the checkpoint has scales for its key/value cache, and the cache of a graph has none"
        raise QcError(what, fix="take kv_cache_scheme out of config.json to read the weights without it")


def _group_of(module: str, groups: list[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The group that names a module: by its name, by a pattern, or by its class, which is the last to count."""
    for group in groups:
        for target in group.get("targets", ()):
            if target == module or (target.startswith("re:") and re.match(target[3:], module)):
                return group
    for group in groups:
        if any(not target.startswith("re:") and "." not in target for target in group.get("targets", ())):
            return group
    raise QcError(f"{module} is packed, and no group of quantization_config names it", fix="fetch the checkpoint again")


class _Weight:
    """One packed weight."""

    def __init__(self, module: str, group: Mapping[str, Any], layout: Any, tensors: Stores):
        self.module, self.group, self.layout, self.tensors = module, group, str(layout), tensors
        self.args: Mapping[str, Any] = dict(group.get("weights") or {})
        if self.layout not in LAYOUTS:
            what = f"{module}.weight lies in the layout {self.layout}, which qc does not read"
            raise QcError(what, fix=f"{FULL}; {', '.join(LAYOUTS)} are read")
        if group.get("output_activations"):
            raise QcError(f"what {module} gives is rounded, which no graph here does", fix=FULL)
        self.kind = self._kind()
        self.codes = self._tensor("weight_packed" if self.layout in PACKED else "weight")
        self.scale = self._tensor("weight_scale")

    def held(self) -> Held:
        rows, columns = self._shape()
        return Held((rows, columns), self._form(columns), partial(self._load, columns), self._inputs())

    def _kind(self) -> Kind:
        bits, scheme = int(self.args.get("num_bits", 0)), self.args.get("type")
        floats = {"nvfp4-pack-quantized": "nvfp4", "mxfp4-pack-quantized": "mxfp4", "mxfp8-quantized": "mxfp8"}
        kind = floats.get(self.layout, "fp8" if scheme == "float" and bits == 8 else f"int{bits}")
        if kind not in ELEMENTS or (scheme == "float" and kind.startswith("int")):
            raise QcError(
                f"{self.module}.weight holds {scheme} numbers of {bits} bits, which qc does not read", fix=FULL
            )
        return cast(Kind, kind)

    def _tensor(self, suffix: str) -> Stored:
        return expected(self.tensors, f"{self.module}.{suffix}")

    def _beside(self, suffix: str) -> Stored | None:
        return self.tensors.get(f"{self.module}.{suffix}")

    def _shape(self) -> tuple[int, int]:
        rows = self.codes.shape[0]
        if self.layout != "pack-quantized":
            return rows, self.codes.shape[1] * (2 if self.layout in PACKED else 1)
        out, inputs = self._tensor("weight_shape").load().tolist()
        return int(out), int(inputs)

    def _form(self, columns: int) -> Format:
        if self.kind in FIXED:
            return Scaled(self.kind)
        blocks = self.scale.shape if len(self.scale.shape) == 2 else (1, 1)
        if self._beside("weight_zero_point") is not None and not self.args.get("symmetric", True):
            bits = ELEMENTS[self.kind].bits
            if bits not in WIDTHS or blocks[0] != self.codes.shape[0]:
                raise QcError(f"{self.module}.weight has zero points of a kind that qc does not read", fix=FULL)
            return Affine(bits, self._columns(columns, blocks[1]), self.scale.dtype, self._scattered())
        if self._scattered():
            bits = ELEMENTS[self.kind].bits
            return Affine(bits, self._columns(columns, blocks[1]), self.scale.dtype, True)
        rows = self.codes.shape[0]
        share = 0 if blocks[0] == 1 and rows > 1 else -(-rows // blocks[0])
        return Scaled(self.kind, share, self._columns(columns, blocks[1]), self.scale.dtype)

    def _columns(self, columns: int, blocks: int) -> int:
        return 0 if blocks == 1 else -(-columns // blocks)

    def _scattered(self) -> bool:
        """Whether the columns of a group are not behind one another."""
        where = self._beside("weight_g_idx")
        if where is None:
            return False
        groups = where.load()
        return bool((groups >= 0).all()) and not bool((groups[1:] >= groups[:-1]).all())

    def _load(self, columns: int) -> dict[str, Tensor]:
        form = self._form(columns)
        codes, scale = self._codes(columns), self.scale.load()
        if isinstance(form, Affine):
            return {"indices": codes, "scale": scale, **self._zeros(form, scale)}
        if self.kind in FIXED:
            sides = {"indices": codes, "scale": scale.view(torch.uint8)}
            if self.kind == "nvfp4":
                sides["global_scale"] = self._tensor("weight_global_scale").load().reshape(1)
            return sides
        return {"indices": codes, "scale": scale.reshape(1, 1) if scale.dim() < 2 else scale}

    def _codes(self, columns: int) -> Tensor:
        """As our formats have them: bytes, integers with half of their range added."""
        codes = self.codes.load()
        if self.layout == "int-quantized":
            return codes.view(torch.uint8).bitwise_xor(0x80)
        bits = ELEMENTS[self.kind].bits
        return codes.contiguous().view(torch.uint8)[:, : packed_columns(columns, bits)].contiguous()

    def _zeros(self, form: Affine, scale: Tensor) -> dict[str, Tensor]:
        """Zeros, packed down the rows; half of the range has been added to them too."""
        stored = self._beside("weight_zero_point")
        half = 1 << form.bits - 1
        if stored is None:
            zero = torch.full(scale.shape, half, dtype=torch.uint8)
        elif self.layout == "pack-quantized":
            words = stored.load().t().contiguous().view(torch.uint8)
            zero = unpack_bits(words[:, : packed_columns(scale.shape[0], form.bits)], form.bits, scale.shape[0])
            zero = zero.t().contiguous()
        else:
            zero = (stored.load().to(torch.int16) + half).to(torch.uint8).reshape(scale.shape)
        where = {"group": self._tensor("weight_g_idx").load().to(torch.int32)} if form.scattered else {}
        return {"zero": zero, **where}

    def _inputs(self) -> Inputs | None:
        """How what the linear reads is rounded."""
        args = dict(self.group.get("input_activations") or {})
        if not args:
            return None
        kind = self.kind if self.kind in (*FIXED, "fp8") else "int8"
        problem = next(self._inputs_not_read(args, kind), None)
        if problem is not None:
            raise QcError(f"what {self.module} reads is rounded {problem}, which qc does not do", fix=FULL)
        if kind == "nvfp4":
            return Inputs("nvfp4", 16, self._tensor("input_global_scale"))
        if args.get("dynamic"):
            columns = FIXED.get(kind) or (int(args.get("group_size") or 0) if args.get("strategy") == "group" else 0)
            return Inputs(cast(InputKind, kind), columns)
        return Inputs(cast(InputKind, kind), 0, self._tensor("input_scale"))

    def _inputs_not_read(self, args: Mapping[str, Any], kind: str) -> Iterator[str]:
        bits, scheme = ELEMENTS[self.kind].bits if kind != "int8" else 8, args.get("type")
        if int(args.get("num_bits", 0)) != bits or (scheme == "int") != (kind == "int8"):
            yield f"to {scheme} numbers of {args.get('num_bits')} bits beside {self.kind} weights"
        if not args.get("symmetric", True):
            yield "with zero points"
        if args.get("dynamic") is False and (kind not in ("fp8", "nvfp4") or args.get("strategy") == "token"):
            yield f"by scales known beforehand, to {kind}"
