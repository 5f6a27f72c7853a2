"""Writing a graph for another runtime: each module beside this one is a target, under its own name.

Nothing but the standard library is imported here, so that listing the targets does not load torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from graph.errors import QcError

ABOUT = "qc-export.json"
"""The file of an export that says what it is: target, dtype, and the sha256 of every other file."""


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote."""

    folder: Path
    target: str
    dtype: str
    files: Mapping[str, int]
    """Name -> bytes."""

    figures: Mapping[str, float | int | str] = field(default_factory=dict)
    """What was counted on the way, under names a reader understands."""

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())


def targets() -> list[str]:
    """The names of all targets."""
    return sorted(file.stem for file in Path(__file__).parent.glob("[!_]*.py"))


def find(target: str) -> Callable[..., ExportReport]:
    """``safetensors`` -> ``runtimes.export.safetensors.export``. Only that module is imported."""
    known = targets()
    if target not in known:
        near = get_close_matches(target, known, n=1)
        fix = f"did you mean {near[0]!r}?" if near else f"use one of: {', '.join(known)}"
        raise QcError(f"no export target is called {target!r}", fix=fix)
    found: Callable[..., ExportReport] = import_module(f"runtimes.export.{target}").export
    return found


def obstacles(target: str, graph: Any, options: Mapping[str, Any]) -> list[QcError]:
    """What stands in the way of an export, as far as shapes tell; only some targets can say."""
    check = getattr(import_module(f"runtimes.export.{target}"), "check", None)
    return [] if check is None else list(check(graph, **options))
