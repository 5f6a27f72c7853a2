"""Exports as tests read them: in their own process, which saves the seconds that imports take, and spoiled but signed."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from graph import Graph
from graph.hashes import blake3_of
from runtimes.export import ABOUT
from runtimes.verify import Report, verify


def read_here(monkeypatch: pytest.MonkeyPatch, worker: ModuleType, *failures: type[Exception]) -> None:
    """Run the reader ``worker`` here; what ``failures`` are raised, a process of its own would end with."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        try:
            worker.main(*command[3:])
        except SystemExit as stop:
            return subprocess.CompletedProcess(command, 1, "", str(stop))
        except failures as error:
            return subprocess.CompletedProcess(command, 1, "", f"{type(error).__name__}: {error}")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("runtimes.verify.findings.subprocess.run", run)


def resigned(folder: Path) -> None:
    """Record the hashes of the files as they are: a fault of the exporter is signed too."""
    about = json.loads((folder / ABOUT).read_text())
    for name, entry in about["files"].items():
        entry["blake3"] = blake3_of(folder / name)
    (folder / ABOUT).write_text(json.dumps(about))


def verified_spoiled(export: Path, into: Path, broken: Callable[[Path], None], graph: Graph) -> Report:
    """What is found of a copy ``into`` of an export that is ``broken``, and signed."""
    folder = Path(shutil.copytree(export, into))
    broken(folder)
    resigned(folder)
    return verify(folder, graph)
