"""Reading ``weight.bin``, the file of large constants: MIL blob storage, version 2.

A header of 64 bytes (count, version), then blobs, each behind 64 bytes that describe it: the mark 0xDEADBEEF, the code
of the element type, the bytes, their place in the file, and how many bits of the last byte are padding. Elements below
a byte are packed with the low bits first and may straddle bytes (coremltools, mlmodel/src/MILBlob).
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from graph.errors import QcError
from runtimes.mil.types import BY_BLOB, DTYPES, Dtype, TensorType

_HEADER, _VERSION, _MARK = 64, 2, 0xDEADBEEF
_FIX = "the package is damaged: export it again"
_NUMPY = {
    "fp16": "<f2", "fp32": "<f4", "int8": "i1", "int16": "<i2", "int32": "<i4", "uint8": "u1", "uint16": "<u2",
    "uint32": "<u4", "bool": "u1",
}  # fmt: skip


class WeightFile:
    """One file of constants, mapped and not read."""

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():
            raise QcError(f"{path} is missing", fix=_FIX)
        size = path.stat().st_size
        if size < _HEADER:
            raise QcError(f"{path} has {size} bytes, too few for its header", fix=_FIX)
        self.bytes: npt.NDArray[np.uint8] = np.memmap(path, np.uint8, "r")
        self.count, version = struct.unpack_from("<II", self.bytes[:8].tobytes())
        if version != _VERSION:
            raise QcError(f"{path} is of version {version}, not {_VERSION}", fix=_FIX)

    def packed(self, offset: int, declared: TensorType) -> npt.NDArray[np.uint8]:
        """The stored bytes of the constant whose description lies at ``offset``, held against its declared type."""
        where = f"the constant at byte {offset} of {self.path}"
        if offset % 64 or offset + _HEADER > len(self.bytes):
            raise QcError(f"{where} lies outside the {len(self.bytes)} bytes of the file", fix=_FIX)
        row = self.bytes[offset : offset + _HEADER].tobytes()
        mark, code, size, start, padding = struct.unpack_from("<IIQQQ", row)
        if mark != _MARK:
            raise QcError(f"{where} has no description there", fix=_FIX)
        stored = BY_BLOB.get(code)
        if stored is not declared.dtype and not (declared.dtype.name == "bool" and code == 3):
            name = stored.name if stored else f"the unknown type {code}"
            raise QcError(f"{where} is stored as {name} and declared as {declared}", fix=_FIX)
        bits = declared.count * declared.dtype.bits
        if size != (bits + 7) // 8 or (declared.dtype.bits < 8 and padding != size * 8 - bits):
            raise QcError(f"{where} has {size} bytes, {declared} needs {(bits + 7) // 8}", fix=_FIX)
        if start + size > len(self.bytes):
            raise QcError(f"{where} ends behind the {len(self.bytes)} bytes of the file", fix=_FIX)
        return self.bytes[start : start + size]

    def read(self, offset: int, declared: TensorType) -> Tensor:
        """The constant as torch holds it."""
        return decode(self.packed(offset, declared), declared)


def decode(packed: npt.NDArray[np.uint8], declared: TensorType) -> Tensor:
    """Stored bytes -> the tensor that holds them (``Dtype.held``)."""
    dtype = declared.dtype
    shape = [length for length in declared.shape if length is not None]
    if dtype.bits < 8:
        values = torch.from_numpy(unpack(packed, dtype, declared.count))
    elif dtype is DTYPES["bf16"]:
        values = torch.from_numpy(packed.view("<i2").copy()).view(torch.bfloat16)
    else:
        viewed = np.frombuffer(packed.tobytes(), _NUMPY[dtype.name])
        values = torch.from_numpy(viewed.astype(np.int64) if dtype.kind == "int" else viewed.copy())
    return values.to(dtype.held).reshape(shape)


def unpack(packed: npt.NDArray[np.uint8], dtype: Dtype, count: int) -> npt.NDArray[np.uint8] | npt.NDArray[np.int8]:
    """Elements of 1, 2, 3, 4 or 6 bits, the low bits first -> one each, ``count`` of them."""
    bits = dtype.bits
    if 8 % bits == 0:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        values = ((packed[:, None] >> shifts) & ((1 << bits) - 1)).reshape(-1)[:count]
    else:  # eight elements in ``bits`` bytes: no element is ever cut at the border of such a group
        groups = -(-len(packed) // bits)
        padded = np.zeros((groups, 8), np.uint8)
        whole = np.zeros(groups * bits, np.uint8)
        whole[: len(packed)] = packed
        padded[:, :bits] = whole.reshape(groups, bits)
        words = padded.view("<u8")
        places = np.arange(8, dtype=np.uint64) * np.uint64(bits)
        values = ((words >> places) & np.uint64((1 << bits) - 1)).astype(np.uint8).reshape(-1)[:count]
    if dtype.name == "int4":
        return np.where(values > 7, values.astype(np.int8) - 16, values).astype(np.int8)
    return values
