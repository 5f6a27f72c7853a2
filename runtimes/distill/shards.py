"""The files of a cache: each appears under its name whole, with its sha256 in the index, or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graph.errors import QcError
from graph.hashes import sha256
from graph.weights import Entry, read_header, write
from runtimes.data.disk import replace_text, sync
from runtimes.distill.layout import Meta

AGAIN = "delete it and run qc cache teacher RECIPE again: only this shard is made anew"
LOCK = ".lock"
_OPEN = 64
_NUMPY = {torch.int32: np.int32, torch.float16: np.float16, torch.float32: np.float32}


@dataclass(frozen=True)
class Known:
    """What the index says of a shard."""

    sha256: str
    bytes: int
    sequences: int


class Shards:
    """The shards of a folder, as far as its index knows them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.known = _index(folder)
        self._sound: set[str] = set()
        self._mapped = lru_cache(maxsize=_OPEN)(self._map)

    def has(self, name: str) -> bool:
        """Whether a shard was written and is still there."""
        return name in self.known and (self.folder / name).is_file()

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Add a shard, or replace it."""
        entries = [Entry(key, tuple(v.shape), v.dtype, lambda v=v: v) for key, v in tensors.items()]  # type: ignore[misc]
        temporary = self.folder / f".{name}.{os.getpid()}.tmp"
        temporary.mkdir(exist_ok=True)
        try:
            write(temporary, entries, stem=Path(name).stem)
            path = temporary / name
            known = Known(sha256(path), path.stat().st_size, len(next(iter(tensors.values()))))
            os.replace(path, self.folder / name)
        finally:
            shutil.rmtree(temporary)
        sync(self.folder)
        self.known[name] = known
        said = {"shards": {key: asdict(self.known[key]) for key in sorted(self.known)}}
        replace_text(self.folder / "index.json", json.dumps(said, indent=1) + "\n")

    def check_size(self, name: str) -> None:
        """Whether a shard is there and as long as it was; cheap, for all shards at once."""
        path = self.folder / name
        if not path.is_file():
            raise QcError(f"the shard {path} is missing", fix="run qc cache teacher RECIPE again: it is made anew")
        size, wanted = path.stat().st_size, self.known[name].bytes
        if size != wanted:
            what = "cut short" if size < wanted else "too long"
            raise QcError(f"the shard {path} is {what}: {size} bytes, not {wanted}", fix=AGAIN)

    def check(self, name: str) -> None:
        """Whether a shard has the bytes that were written; each is read for this once."""
        if name in self._sound:
            return
        self.check_size(name)
        path = self.folder / name
        if sha256(path) != self.known[name].sha256:
            raise QcError(f"the shard {path} is damaged: its sha256 is not the one in index.json", fix=AGAIN)
        self._sound.add(name)

    def tensors(self, name: str, meta: Meta) -> Mapping[str, NDArray[np.generic]]:
        """The tensors of a shard, mapped into memory."""
        self.check(name)
        return self._mapped(name, meta)

    def _map(self, name: str, meta: Meta) -> dict[str, NDArray[np.generic]]:
        path = self.folder / name
        raw = np.memmap(path, np.uint8, "r")
        found = {}
        stored = read_header(path)
        for key, (shape, dtype) in meta.shapes(self.known[name].sequences).items():
            if key not in stored or (stored[key].shape, stored[key].dtype) != (shape, dtype):
                raise QcError(f"the shard {path} holds no {key} as meta.json describes it", fix=AGAIN)
            part = raw[stored[key].start : stored[key].end]
            found[key] = part.view(_NUMPY[dtype]).reshape(shape)
        return found


def _index(folder: Path) -> dict[str, Known]:
    path = folder / "index.json"
    if not path.is_file():
        return {}
    try:
        said = json.loads(path.read_text(encoding="utf-8"))["shards"]
        return {name: Known(**known) for name, known in said.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise QcError(f"{path} is damaged", fix="make the cache again: qc cache teacher RECIPE --force") from None


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Inside, no other process writes to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise QcError(f"another process is writing the cache {folder}", fix="wait until it is done") from None
        yield
