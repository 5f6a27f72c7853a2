"""Tensors in safetensors files: read one at a time, written as a stream, hashed.

A file is opened for one tensor and closed again, so that reading a checkpoint never holds more than that tensor.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graph.errors import QcError

_NAMES: dict[torch.dtype, str] = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies on disk, and what it is."""

    file: str
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    """First byte, counted from the beginning of the file."""

    transposed: bool = False
    """The file has it [in, out] where the graph has it [out, in]."""

    def load(self) -> Tensor:
        """Read it, as stored but for ``transposed``."""
        size = _bytes(self.shape, self.dtype)
        data = torch.empty(size, dtype=torch.uint8)
        try:
            with open(self.file, "rb", buffering=0) as file:
                _read_into(file.fileno(), data, self.start)
        except OSError as error:
            raise QcError(
                f"cannot read {self.file}: {error.strerror}", fix="see that the checkpoint is still there and readable"
            ) from None
        value = data.view(self.dtype).view(self.shape)
        return value.t().contiguous() if self.transposed else value


def _read_into(descriptor: int, data: Tensor, start: int) -> None:
    view, done = memoryview(_raw(data)), 0
    while done < len(view):
        step = os.preadv(descriptor, [view[done : done + (1 << 27)]], start + done)
        if step == 0:
            raise QcError(
                "a weight file ends in the middle of a tensor", fix="fetch the checkpoint again: a shard is cut short"
            )
        done += step


def read_header(path: Path) -> dict[str, Stored]:
    """All tensors of a safetensors file; a damaged file is an error that names it."""
    fix = "fetch the file again, or point the recipe at an undamaged checkpoint"
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(size - 8, 100 << 20):
                kind = (
                    "a pickle, which qc never reads" if start[:2] in (b"\x80\x02", b"PK") else "not a safetensors file"
                )
                raise QcError(
                    f"{path} is {kind}", fix="convert the checkpoint to safetensors" if "pickle" in kind else fix
                )
            header = json.loads(file.read(length))
    except OSError as error:
        raise QcError(f"cannot read {path}: {error.strerror}", fix="check the path and its permissions") from None
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise QcError(f"the header of {path} is damaged", fix=fix) from None
    found = dict(_entries(path, header, 8 + length, size, fix))
    covered = sum(_bytes(s.shape, s.dtype) for s in found.values())
    if 8 + length + covered != size:
        raise QcError(f"{path} has {size} bytes where its header announces {8 + length + covered}", fix=fix)
    return found


def _entries(path: Path, header: object, data: int, size: int, fix: str) -> Iterator[tuple[str, Stored]]:
    if not isinstance(header, dict):
        raise QcError(f"the header of {path} is damaged", fix=fix)
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        try:
            dtype, shape = _DTYPES[entry["dtype"]], tuple(int(d) for d in entry["shape"])
            start, end = entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise QcError(f"the header of {path} is damaged at {key}", fix=fix) from None
        if min(shape, default=0) < 0 or not 0 <= start <= end or end - start != _bytes(shape, dtype):
            raise QcError(f"{path} gives {key} a shape that does not fit its bytes", fix=fix)
        if data + end > size:
            raise QcError(f"{path} is cut short: {key} ends at byte {data + end} of {size}", fix=fix)
        yield key, Stored(str(path), key, shape, dtype, data + start)


def read_metadata(path: Path) -> dict[str, str]:
    """The text a safetensors file carries beside its tensors."""
    read_header(path)
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return dict(header.get("__metadata__", {}))


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: its type is known at once, its value is asked for when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return _bytes(self.shape, self.dtype)


def write(folder: Path, entries: Iterable[Entry], *, stem: str, max_shard: int = 5 << 30) -> dict[str, str]:
    """Write ``entries`` to ``stem.safetensors``, or to numbered shards and an index; return name -> file.

    One tensor is held at a time. Files appear under their own names at once: write into a temporary folder.
    """
    shards: list[list[Entry]] = [[]]
    for entry in sorted(entries, key=lambda e: e.name):
        if shards[-1] and sum(e.bytes for e in shards[-1]) + entry.bytes > max_shard:
            shards.append([])
        shards[-1].append(entry)
    names = (
        [f"{stem}.safetensors"]
        if len(shards) == 1
        else [f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    )
    where: dict[str, str] = {}
    for name, shard in zip(names, shards, strict=True):
        _write_one(folder / name, shard)
        where |= {e.name: name for e in shard}
    if len(shards) > 1:
        total = sum(e.bytes for shard in shards for e in shard)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return where


def _write_one(path: Path, entries: list[Entry]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [at, at + entry.bytes],
        }
        at += entry.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            value = entry.load()
            assert tuple(value.shape) == entry.shape and value.dtype == entry.dtype, f"{entry.name} changed its type"
            if value.numel():
                file.write(_raw(value))
        file.flush()
        os.fsync(file.fileno())


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_sha256(value: Tensor) -> str:
    """The sha256 of a tensor's bytes."""
    return hashlib.sha256(_raw(value)).hexdigest()


def _raw(value: Tensor) -> Any:
    """The bytes of a tensor, not copied where it is contiguous on the CPU."""
    flat = value.detach().contiguous().cpu().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else b""


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    count = 1
    for size in shape:
        count *= size
    return count * dtype.itemsize
