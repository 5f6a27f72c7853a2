"""Readers of exports in the process of the tests, which saves the seconds that it takes to import libraries anew."""

from __future__ import annotations

import subprocess
from types import ModuleType

import pytest


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
