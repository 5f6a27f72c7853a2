"""Writing folders whole or not at all, and saying in plain words why a disk refused."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from graph.errors import QcError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


@contextmanager
def explained(what: str, folder: Path) -> Iterator[None]:
    """Turn what the operating system says while ``what`` is written to ``folder`` into something a user can act on."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise QcError(
                f"the disk is full: {what} did not fit into {folder}",
                fix="free some space and run it again; it goes on from the last checkpoint",
            ) from error
        said = error.strerror or error
        raise QcError(f"cannot write {what} to {folder}: {said}", fix="choose a folder you may write to") from error


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill, which becomes ``folder`` at once when all in it is safe on disk."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in temporary.iterdir():
            sync(path)
        sync(temporary)
        remove(folder)
        os.replace(temporary, folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_text(path: Path, text: str) -> None:
    """Give a file another text, at once."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Take a folder away in one move, so that a kill in between leaves it whole or gone."""
    if not folder.exists():
        return
    gone = folder.with_name(f".{folder.name}.{os.getpid()}.gone.tmp")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(folder, gone)
    shutil.rmtree(gone)


def sweep(folder: Path) -> None:
    """Remove what a killed process left behind in ``folder``."""
    for path in folder.glob(".*.tmp"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def sync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
