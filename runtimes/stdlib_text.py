"""A corpus every machine already has: the Python standard library's own source, split by hash of the path.

Nothing is stored: the files are read from the interpreter that runs. The split follows from a file's path alone,
so a file held out on one machine is held out on every other; the text differs a little between Python releases.
"""

from __future__ import annotations

import hashlib
import sysconfig
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Literal

Split = Literal["train", "heldout"]

_HELD_OUT_ONE_IN = 20
_FOREIGN_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})
_GENERATED_PREFIXES = ("config-", "_sysconfigdata")  # written when Python was built; they name the build machine


@cache
def stdlib_root() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def split_of(relative: PurePosixPath) -> Split:
    """The split of a file, given its path below the standard library.

    >>> split_of(PurePosixPath("this.py")), split_of(PurePosixPath("bisect.py"))
    ('train', 'train')
    """
    digest = hashlib.sha256(str(relative).encode()).hexdigest()
    return "heldout" if int(digest, 16) % _HELD_OUT_ONE_IN == 0 else "train"


def stdlib_files(split: Literal["train", "heldout"]) -> list[Path]:
    """The files of a split in sorted order; the `test` package is among them where the interpreter has it."""
    return [path for path in _readable_files() if split_of(relative_path(path)) == split]


def relative_path(path: Path) -> PurePosixPath:
    """The path below the standard library, with forward slashes on every system."""
    return PurePosixPath(path.relative_to(stdlib_root()).as_posix())


def is_test(path: Path) -> bool:
    """Whether a file belongs to a test suite rather than to the library proper."""
    return not {"test", "tests"}.isdisjoint(relative_path(path).parts[:-1])


def read_text(path: Path) -> str:
    """The text of a file, its line ends as they are on disk."""
    return path.read_bytes().decode("utf-8")


@cache
def _readable_files() -> tuple[Path, ...]:
    candidates = sorted(stdlib_root().rglob("*.py"), key=lambda path: str(relative_path(path)))
    return tuple(path for path in candidates if _belongs(relative_path(path)) and _holds_text(path))


def _belongs(relative: PurePosixPath) -> bool:
    if not _FOREIGN_FOLDERS.isdisjoint(relative.parts):
        return False
    return not any(part.startswith(_GENERATED_PREFIXES) for part in relative.parts)


def _holds_text(path: Path) -> bool:
    try:
        return bool(read_text(path))
    except (UnicodeDecodeError, OSError):
        return False
