"""Exports as tests read them: in their own process, which saves the seconds that imports take, and spoiled but signed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from graph.weights import sha256
from runtimes.export import ABOUT


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
        entry["sha256"] = sha256(folder / name)
    (folder / ABOUT).write_text(json.dumps(about))
