"""Tensors in safetensors files: read one at a time, written as a stream, hashed.

A file is opened for one tensor and closed again, so that reading a checkpoint never holds more than that tensor.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graph.behind import Flushed
from graph.errors import QcError
from graph.hashes import new_blake3, raw
from graph.pages import room

if TYPE_CHECKING:
    from blake3 import blake3

_NAMES: dict[torch.dtype, str] = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}

AT_ONCE = 4
"""Tensors that are made at the same time to be written, at most: they are in memory together."""

WAITING = 3
"""Tensors that are made, or wait for a thread, beyond those: no thread idles while another writes a large one."""

WORTH_A_TURN = 1 << 22
"""Bytes that are made in one go, at least: small tensors are not worth a place among those."""


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

    @property
    def end(self) -> int:
        """The byte behind its last one."""
        return self.start + _bytes(self.shape, self.dtype)

    def rows(self, start: int, stop: int) -> Stored:
        """Some of its rows, which lie behind one another."""
        assert not self.transposed, self.key
        rest = self.shape[1:]
        return replace(self, shape=(stop - start, *rest), start=self.start + start * _bytes(rest, self.dtype))

    def load(self, place: Callable[[int], Tensor] = room) -> Tensor:
        """Read it, as stored but for ``transposed``, into bytes that ``place`` gives."""
        size = _bytes(self.shape, self.dtype)
        data = place(size)
        try:
            with open(self.file, "rb", buffering=0) as file:
                if not _read_into(file.fileno(), data, self.start):
                    raise QcError(f"{self.file} ends in the middle of {self.key}", fix=_FETCH)
        except OSError as error:
            raise QcError(
                f"cannot read {self.file}: {error.strerror}", fix="see that the checkpoint is still there and readable"
            ) from None
        value = data.view(self.dtype).view(self.shape)
        return value.t().contiguous() if self.transposed else value


def _read_into(descriptor: int, data: Tensor, start: int) -> bool:
    """Fill ``data``; False where the file ends before."""
    view, done = memoryview(raw(data)), 0
    while done < len(view):
        step = os.preadv(descriptor, [view[done : done + (1 << 27)]], start + done)
        if step == 0:
            return False
        done += step
    return True


_FETCH = "fetch the file again, or point the recipe at an undamaged checkpoint"


def read_header(path: Path) -> dict[str, Stored]:
    """All tensors of a safetensors file; a damaged file is an error that names it."""
    return _open(path)[0]


def read_metadata(path: Path) -> dict[str, str]:
    """The text a safetensors file carries beside its tensors."""
    return _open(path)[1]


def _open(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors and the metadata of a file, by the letter of the format: nothing overlaps, nothing is left over."""
    size, text = _header(path)
    try:
        header = json.loads(text, object_pairs_hook=_no_duplicates) if text.rstrip(b" ").endswith(b"}") else None
    except (ValueError, RecursionError):
        header = None
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise QcError(f"the header of {path} is damaged", fix=_FETCH)
    assert isinstance(header, dict)
    data, found, end = 8 + len(text), {}, 0
    for key, entry in header.items():
        found[key] = _entry(path, key, entry, data, size)
    for stored in sorted(found.values(), key=lambda s: (s.start, s.end)):
        if stored.start != data + end:
            what = f"the header of {path} is damaged at {stored.key}: its bytes do not begin where the last end"
            raise QcError(what, fix=_FETCH)
        end = stored.end - data
    if data + end != size:
        raise QcError(f"{path} has {size} bytes where its header announces {data + end}", fix=_FETCH)
    return found, metadata


def _header(path: Path) -> tuple[int, bytes]:
    """The size of a file, and its header's bytes."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if 2 <= length <= min(size - 8, 100 << 20):
                return size, file.read(length)
    except OSError as error:
        raise QcError(f"cannot read {path}: {error.strerror}", fix="check the path and its permissions") from None
    if start[:2] == b"PK" or (start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        raise QcError(f"{path} is a pickle, which qc never reads", fix="convert the checkpoint to safetensors")
    raise QcError(f"{path} is not a safetensors file", fix=_FETCH)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def _entry(path: Path, key: str, entry: Any, data: int, size: int) -> Stored:
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, start, end))
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole or len(entry) != 3 or not isinstance(dtype, str):
        raise QcError(f"the header of {path} is damaged at {key}", fix=_FETCH)
    if dtype not in _DTYPES:
        raise QcError(f"{path} holds {key} as {dtype}, which is no dtype that qc reads", fix=_FETCH)
    if end - start != _bytes(tuple(shape), _DTYPES[dtype]):
        raise QcError(f"{path} gives {key} a shape that does not fit its bytes", fix=_FETCH)
    if data + end > size:
        raise QcError(f"{path} is cut short: {key} ends at byte {data + end} of {size}", fix=_FETCH)
    return Stored(str(path), key, tuple(shape), _DTYPES[dtype], data + start)


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: its type is known at once, its value is asked for when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    made_with: str | None = None
    """What comes of the same work has the same name here: one thread asks for all of it."""

    pieces: tuple[Entry, ...] = ()
    """What it is made of, one behind the other, if it is too large to be held: then ``load`` is not called."""

    @property
    def bytes(self) -> int:
        return _bytes(self.shape, self.dtype)


def write(
    folder: Path,
    entries: Iterable[Entry],
    *,
    stem: str,
    max_shard: int = 5 << 30,
    hashes: dict[str, str] | None = None,
) -> dict[str, str]:
    """Write ``entries`` to ``stem.safetensors``, or to numbered shards and an index; return name -> file.

    Few tensors are held at a time. ``hashes`` gets the BLAKE3 hash of each file of tensors, found of what is written,
    so that nothing is read again. Files appear under their own names at once: write into a temporary folder.
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
        digest = None if hashes is None else new_blake3()
        _write_one(folder / name, shard, digest)
        if hashes is not None and digest is not None:
            hashes[name] = digest.hexdigest()
        where |= {e.name: name for e in shard}
    if len(shards) > 1:
        total = sum(e.bytes for shard in shards for e in shard)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return where


def _write_one(path: Path, entries: list[Entry], digest: blake3 | None) -> None:
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
    with open(path, "wb") as file, ThreadPoolExecutor(1) as pool:
        flushed = Flushed(file, pool)
        for data in chain([struct.pack("<Q", len(text)) + text], _values(entries)):
            if digest is not None:
                digest.update(data)
            flushed.write(data)
        flushed.close()


def _values(entries: list[Entry]) -> Iterator[Any]:
    """The bytes of each, some tensors ahead of their turn: most are packed on the way out."""
    from graph.formats.ahead import worked_ahead

    pieces = chain.from_iterable(entry.pieces or (entry,) for entry in entries)
    together = (list(group) for _, group in groupby(pieces, lambda entry: entry.made_with or entry.name))
    threads = min(torch.get_num_threads(), AT_ONCE)
    made = worked_ahead(lambda group: [*map(_value_of, group)], _filled(together), threads, WAITING)
    return chain.from_iterable(made)


def _filled(groups: Iterable[list[Entry]]) -> Iterator[list[Entry]]:
    """Groups one behind the other, the small of them together: each is worth the turn of a thread."""
    ready: list[Entry] = []
    for group in groups:
        ready += group
        if sum(entry.bytes for entry in ready) >= WORTH_A_TURN:
            yield ready
            ready = []
    if ready:
        yield ready


def _value_of(entry: Entry) -> Any:
    """The bytes of a tensor whose turn has come."""
    value = entry.load()
    assert tuple(value.shape) == entry.shape and value.dtype == entry.dtype, f"{entry.name} changed its type"
    return raw(value)


def all_finite(value: Tensor) -> bool:
    """Whether there is neither NaN nor infinity in it; ten times quicker than asking every value."""
    if not value.is_floating_point() or not value.numel():
        return True
    wide = value.float() if value.dtype.itemsize == 1 else value
    return all(math.isfinite(end) for end in wide.detach().aminmax())


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    count = 1
    for size in shape:
        count *= size
    return count * dtype.itemsize
