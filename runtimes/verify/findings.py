"""What every verification shares: its findings, the files of an export, a process for the reader."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from graph import QcError
from graph.hashes import is_as_recorded, is_record
from runtimes.export import ABOUT

PROBE_TEXTS = ("def main(argv):\n    return 0\n", "The quick brown fox, naïve café, 東京.", " two  spaces\tand a tab")


_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".data")
"""How files end that readers look for weights in."""


@dataclass(frozen=True)
class Finding:
    """One thing that was checked."""

    what: str
    passed: bool
    found: str


@dataclass(frozen=True)
class Report(ABC):
    """What was found of an export, whatever its target."""

    findings: tuple[Finding, ...]
    """Everything that was checked."""

    @property
    def passed(self) -> bool:
        """Whether everything is as it should be."""
        return all(finding.passed for finding in self.findings)

    def table(self) -> str:
        """One line for everything that was checked."""
        width = max(len(f.what) for f in self.findings)
        return "\n".join(f"{'ok  ' if f.passed else 'FAIL'}  {f.what:<{width}}  {f.found}" for f in self.findings)

    @abstractmethod
    def figures(self) -> dict[str, Any]:
        """For a report or ``--json``; ``export/psnr_db`` and ``top1`` are always there."""


def read_about(folder: Path) -> dict[str, Any]:
    """What an export says of itself."""
    path = folder / ABOUT
    if not path.is_file():
        raise QcError(f"{folder} is no export of qc: it has no {ABOUT}", fix="give the folder that qc export wrote")
    try:
        about: dict[str, Any] = json.loads(path.read_text())
        if about["format"] != "qc-export" or not about["target"] or not _records(about["files"]):
            raise KeyError("format")
    except (OSError, ValueError, KeyError, TypeError):
        raise QcError(f"{path} is damaged", fix="export again") from None
    return about


def _records(files: Any) -> bool:
    """Whether each file, of the folder and no other, has a hash."""
    if not isinstance(files, Mapping) or not files:
        return False
    inside = all(".." not in Path(name).parts and not Path(name).is_absolute() for name in files)
    return inside and all(map(is_record, files.values()))


def hashes(folder: Path, about: Mapping[str, Any]) -> Finding:
    """Every file is there, and what was written; nothing else is there that a reader may take for weights."""
    for name, entry in about["files"].items():
        path = folder / name
        if not path.is_file():
            return Finding("files", False, f"{name} is missing")
        if not is_as_recorded(path, entry):
            return Finding("files", False, f"{name} is not what was written: its hash is wrong")
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.suffix in _WEIGHTS)
    other = next((name for name in names if name not in about["files"]), None)
    if other is not None:
        return Finding("files", False, f"{other} is none of those that were written")
    return Finding("files", True, f"{len(about['files'])}, each with its hash")


def same_tokens(said: list[list[int]] | None, tokenizer: Any) -> Finding:
    """Whether the tokenizer of an export makes the tokens ``said`` of the probe texts that the model's makes."""
    if said is None:
        return Finding("tokenizer", tokenizer is None, "none" if tokenizer is None else "missing")
    wanted = said if tokenizer is None else [list(tokenizer(text)["input_ids"]) for text in PROBE_TEXTS]
    same = said == wanted
    return Finding("tokenizer", same, f"{len(PROBE_TEXTS)} texts, the same tokens" if same else "gives other tokens")


def exchanged(
    worker: str, folder: Path, given: dict[str, Tensor], asked: dict[str, str] | None, timeout: float
) -> tuple[dict[str, Tensor], dict[str, Any]] | str:
    """What ``worker`` makes of these tensors in a process of its own, and the facts it tells; or why there is none."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory(prefix="qc-verify-") as temporary:
        inputs, outputs = Path(temporary) / "inputs.safetensors", Path(temporary) / "outputs.safetensors"
        save_file(given, inputs, metadata=asked)
        failed = read_afresh(f"runtimes.verify.{worker}", folder, inputs, outputs, timeout)
        if failed is not None:
            return failed
        with safe_open(outputs, framework="pt") as file:
            facts: dict[str, Any] = json.loads(file.metadata()["facts"])
        return load_file(outputs), facts


def read_afresh(module: str, folder: Path, inputs: Path, outputs: Path, timeout: float) -> str | None:
    """Run a reader in a process of its own; why it failed, or None."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, "-m", module, str(folder), str(inputs), str(outputs)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    except subprocess.TimeoutExpired:
        return f"the reader did not finish in {timeout:g} s"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"the reader ended with {done.returncode}"]
        return lines[-1][:300]
    return None
