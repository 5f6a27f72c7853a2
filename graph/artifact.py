"""The artifact: a folder that holds a graph, its weights and how it came about. It is never changed in place.

graph.json            the graph, as data
graph.txt             its text
weights.safetensors   its tensors (or numbered shards)
recipe.yaml           the recipe, verbatim
recipe.lock.yaml      the recipe, resolved
manifest.json         BLAKE3 of every file, sha256 of itself, the parent artifact, a report for each pass
tokenizer/            the tokenizer and the generation settings of the model
memory_tokenizer/     the tokenizer of the encoder, of a graph that has one
passes/NN-name.txt    the text after each pass
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graph.core import Graph
from graph.errors import QcError
from graph.hashes import is_as_recorded, recorded, sha256
from graph.schema import from_json, to_json
from graph.tokenizer import copy_tokenizer, has_tokenizer, load_tokenizer
from graph.weights import Entry, Stored, read_header, write

VERSION = 1


@dataclass(frozen=True)
class Artifact:
    """A loaded artifact. The weights are read when the graph is asked for them."""

    folder: Path
    graph: Graph
    manifest: dict[str, Any] = field(repr=False)

    @property
    def digest(self) -> str:
        """The sha256 of its manifest: the identity of all its files."""
        return sha256(self.folder / "manifest.json")

    @property
    def tokenizer(self) -> Path | None:
        """The folder of its tokenizer."""
        folder = self.folder / "tokenizer"
        return folder if folder.is_dir() else None

    @property
    def reads_text(self) -> bool:
        """Whether it has a tokenizer; settings for generation alone are none."""
        return self.tokenizer is not None and has_tokenizer(self.tokenizer)

    @property
    def memory_tokenizer(self) -> Path | None:
        """The folder of the tokenizer of its encoder, where it has an encoder."""
        folder = self.folder / "memory_tokenizer"
        return folder if folder.is_dir() else None

    def load_memory_tokenizer(self) -> Any:
        """The tokenizer of its encoder; None where it has none."""
        return None if self.memory_tokenizer is None else load_tokenizer(self.memory_tokenizer, str(self.folder))

    def load_tokenizer(self) -> Any:
        """Its tokenizer, or a QcError where it has none."""
        return load_tokenizer(self.tokenizer, str(self.folder))


def save(
    folder: Path,
    graph: Graph,
    *,
    texts: Mapping[str, str] | None = None,
    tokenizer: Path | None = None,
    memory_tokenizer: Path | None = None,
    parent: str | None = None,
    about: Mapping[str, Any] | None = None,
    max_shard: int = 5 << 30,
) -> Artifact:
    """Write an artifact. It appears whole or not at all; a folder that is already there is an error.

    ``texts`` are further files (``recipe.yaml``, ``passes/01-quantize-base.txt``), ``about`` goes into the manifest.
    """
    graph.verify()
    with appearing(folder) as new:
        hashes: dict[str, str] = {}
        write(new, entries(graph), stem="weights", max_shard=max_shard, hashes=hashes)
        (new / "graph.json").write_text(json.dumps(to_json(graph), indent=1) + "\n", encoding="utf-8")
        (new / "graph.txt").write_text(f"{graph}\n", encoding="utf-8")
        for name, content in (texts or {}).items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_text(content, encoding="utf-8")
        if tokenizer is not None:
            copy_tokenizer(tokenizer, new / "tokenizer")
        if memory_tokenizer is not None:
            copy_tokenizer(memory_tokenizer, new / "memory_tokenizer")
        names = {str(p.relative_to(new)): p for p in _files(new)}
        files = {name: recorded(p, hashes.get(name)) for name, p in names.items()}
        manifest = {"format": "qc-artifact", "version": VERSION, "parent": parent, **(about or {}), "files": files}
        (new / "manifest.json").write_bytes(sealed(manifest))
    return load(folder, check_hashes=False)


def entries(graph: Graph) -> Iterator[Entry]:
    """All tensors of a graph, to be written one at a time."""
    for name in graph.tensors():
        yield Entry(name, graph.shape(name), graph.dtype_of(name), _loader(graph, name))


def _loader(graph: Graph, name: str) -> Callable[[], Any]:
    return lambda: graph.tensor(name)


def load(folder: Path, *, check_hashes: bool = True) -> Artifact:
    """Open an artifact, strictly: every file with its hash, every tensor known and of its shape, every op allowed."""
    manifest = read_manifest(folder)
    files = {folder / name: entry for name, entry in manifest["files"].items()}
    for path, entry in files.items():
        _expect_size(path, entry)
    with ThreadPoolExecutor(2) as pool:  # hashing the weights takes seconds, and so does reading the graph
        intact = [pool.submit(_expect_hash, path, entry) for path, entry in files.items() if check_hashes]
        try:
            graph = _read_graph(folder, manifest["files"])
        finally:
            for one in intact:
                one.result()  # a file that was changed explains whatever else is wrong
    return Artifact(folder, graph, manifest)


def _read_graph(folder: Path, files: Mapping[str, Any]) -> Graph:
    stored = _stored(folder, files)
    path = folder / "graph.json"
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        raise QcError(f"{path} cannot be read", fix=_FIX) from None
    return from_json(data, stored, str(path))


_FIX = "the artifact is damaged; compile the recipe again"


def _expect_size(path: Path, entry: Mapping[str, Any]) -> None:
    """See that a file is there, and whole."""
    try:
        size = path.stat().st_size if path.is_file() else None
    except OSError as error:
        raise _unreadable(path, error) from None
    if size is None:
        raise QcError(f"{path} is missing", fix=_FIX)
    if size != entry["bytes"]:
        raise QcError(f"{path} has {size} bytes, the manifest says {entry['bytes']}", fix=_FIX)


def _expect_hash(path: Path, entry: Mapping[str, Any]) -> None:
    """See that a file is the one that was written."""
    try:
        intact = is_as_recorded(path, entry)
    except OSError as error:
        raise _unreadable(path, error) from None
    if not intact:
        raise QcError(f"{path} is not what was written: its hash is wrong", fix=_FIX)


def _unreadable(path: Path, error: OSError) -> QcError:
    return QcError(f"{path} cannot be read: {error.strerror}", fix="check the permissions and the disk")


def _stored(folder: Path, files: Mapping[str, Any]) -> dict[str, Stored]:
    """Where each tensor lies. Weight files that the manifest does not list are no part of the artifact."""
    stored: dict[str, Stored] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in files:
            raise QcError(
                f"{path} is not in the manifest", fix="remove the file; an artifact is never changed in place"
            )
        for name, source in read_header(path).items():
            if name in stored:
                raise QcError(f"{name} lies in both {stored[name].file} and {path}", fix=_FIX)
            stored[name] = source
    return stored


def sealed(manifest: Mapping[str, Any]) -> bytes:
    """A manifest as its file: the same bytes for the same content, its own sha256 among them."""
    text = json.dumps({**manifest, "seal": ""}, indent=1, sort_keys=True) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    return (json.dumps({**manifest, "seal": digest}, indent=1, sort_keys=True) + "\n").encode()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact; a QcError where the folder is none."""
    path = folder / "manifest.json"
    if not folder.is_dir():
        raise QcError(f"no artifact {folder}", fix="run qc compile first, or give the folder of an artifact")
    if not path.is_file():
        raise QcError(
            f"{folder} is not an artifact: it has no manifest.json",
            fix="give a folder that qc compile or qc train wrote",
        )
    try:
        content = path.read_bytes()
        manifest: dict[str, Any] = json.loads(content)
        if manifest["format"] != "qc-artifact":
            raise KeyError("format")
        if manifest.get("version") != VERSION:
            what = f"{folder} has version {manifest.get('version')}, this qc reads {VERSION}"
            raise QcError(what, fix="compile the recipe again")
        if sealed(manifest) != content:
            raise ValueError("changed")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise QcError(f"{path} is damaged", fix=_FIX) from None
    return manifest


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the name ``folder`` when all is written, and goes when it is not."""
    new = folder.parent / f".{folder.name}.tmp-{os.getpid()}"
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise QcError(
                f"{folder} is already there", fix="give another folder, or remove it first: nothing is overwritten"
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        new.mkdir()
        yield new
        for path in _files(new):
            _sync(path)
        _sync(new)
        os.replace(new, folder)
        _sync(folder.parent)
    except OSError as error:
        raise disk_error(error, folder) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def disk_error(error: OSError, where: Path) -> QcError:
    """What the user is told of a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return QcError(
            f"no room left to write {where}", fix="free some space, or write to another disk; nothing was left behind"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return QcError(f"{where} cannot be written: {error.strerror}", fix="give a folder that you may write to")
    return QcError(f"writing {where} failed: {error.strerror or error}", fix="check the path and the disk")


def _sweep(folder: Path) -> None:
    """Remove what killed processes left of this folder."""
    for old in folder.parent.iterdir():
        stem, _, pid = old.name.rpartition("-")
        ended = pid.isdigit() and (int(pid) == os.getpid() or not Path(f"/proc/{pid}").exists())
        if stem == f".{folder.name}.tmp" and ended:
            shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())
