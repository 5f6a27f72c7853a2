"""The types of MIL values, and how torch holds them.

Floats of every width are held as fp32: the interpreter's arithmetic is fp32, and a mode decides what is rounded to the
declared type. Integers wider than a byte are held as int32, the others, which are indices and packed weights, in a
byte each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Dtype:
    """One element type."""

    name: str
    bits: int
    kind: str
    """``float``, ``int``, ``bool`` or ``string``."""

    @property
    def held(self) -> torch.dtype:
        """The torch type that holds it."""
        if self.kind == "int" and self.bits <= 8:
            return torch.uint8 if self.name.startswith("u") else torch.int8
        return {"float": torch.float32, "int": torch.int32, "bool": torch.bool}[self.kind]


_ROWS = (
    # name, bits, kind, code in MIL.proto, code in weight.bin (mlmodel/src/MILBlob/Blob/BlobDataType.hpp)
    ("bool", 8, "bool", 1, None),
    ("string", 0, "string", 2, None),
    ("fp16", 16, "float", 10, 1),
    ("fp32", 32, "float", 11, 2),
    ("bf16", 16, "float", 13, 5),
    ("int8", 8, "int", 21, 4),
    ("int16", 16, "int", 22, 6),
    ("int32", 32, "int", 23, 14),
    ("int4", 4, "int", 25, 8),
    ("uint8", 8, "int", 31, 3),
    ("uint16", 16, "int", 32, 7),
    ("uint32", 32, "int", 33, 15),
    ("uint4", 4, "int", 35, 11),
    ("uint2", 2, "int", 36, 10),
    ("uint1", 1, "int", 37, 9),
    ("uint6", 6, "int", 38, 13),
    ("uint3", 3, "int", 39, 12),
)
DTYPES = {name: Dtype(name, bits, kind) for name, bits, kind, _, _ in _ROWS}
BY_PROTO = {code: DTYPES[name] for name, _, _, code, _ in _ROWS}
BY_BLOB = {code: DTYPES[name] for name, _, _, _, code in _ROWS if code is not None}


@dataclass(frozen=True)
class TensorType:
    """An element type and a shape; a length of None is not known before the run."""

    dtype: Dtype
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        return f"{self.dtype.name}[{', '.join('?' if n is None else str(n) for n in self.shape)}]"

    @property
    def static(self) -> bool:
        """Whether every length is known."""
        return None not in self.shape

    @property
    def count(self) -> int:
        """Elements; the shape must be known."""
        total = 1
        for length in self.shape:
            assert length is not None, "the elements of a shape that is not known"
            total *= length
        return total

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of that shape is of this type."""
        return len(shape) == len(self.shape) and all(a in (None, b) for a, b in zip(self.shape, shape, strict=True))
