"""Checkpoints: everything a training needs to go on as if it had never stopped, whole on disk or not there.

checkpoints/step-120/            trained.safetensors, optimizer.safetensors, average.safetensors, state.json
checkpoints/best, last           links to the step they stand for

What is random follows from the seed and the step alone (the data's order and dropout), so that the state of no
generator has to be kept. Nothing is pickled; ``state.json`` has the sha256 of every file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from graph import QcError
from graph.hashes import sha256
from graph.weights import Entry, read_header, write
from runtimes.data.disk import explained, new_folder, remove, sweep

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class State:
    """Where a training stands."""

    step: int = 0
    """Optimizer steps taken."""

    rows: int = 0
    """Rows of data used."""

    tokens: int = 0
    """Tokens trained on."""

    seconds: float = 0.0
    """Time spent on it."""

    best_step: int | None = None
    best_loss: float | None = None
    """The step with the lowest evaluation loss, and that loss in nats a token."""

    identity: Mapping[str, Any] = field(default_factory=dict)
    """What must not change when it is resumed: settings, data, names and shapes of the trained tensors."""


Tensors = Mapping[str, Mapping[str, Tensor]]
"""File stem -> name -> tensor."""


class Checkpoints:
    """The checkpoints of one training."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep

    def start(self, fresh: bool) -> None:
        """Make the folder, and clear away what a killed run left half-written, or everything if ``fresh``."""
        with explained("checkpoints", self.folder):
            if fresh:
                remove(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            sweep(self.folder)

    def save(self, state: State, tensors: Tensors, periodic: bool) -> Path:
        """Write a checkpoint, point ``last`` (and ``best``) at it, and drop periodic ones beyond ``keep``."""
        path = self.folder / f"step-{state.step}"
        with explained(f"the checkpoint of step {state.step}", self.folder):
            with new_folder(path) as temporary:
                for stem, named in tensors.items():
                    write(temporary, [_entry(name, value) for name, value in named.items()], stem=stem)
                hashes = {file.name: sha256(file) for file in sorted(temporary.iterdir())}
                about = {"format": FORMAT, "periodic": periodic, **asdict(state), "sha256": hashes}
                (temporary / "state.json").write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")
            self._link("last", path.name)
            if state.best_step == state.step:
                self._link("best", path.name)
            self._drop(state)
        return path

    def newest(self) -> tuple[Path, State] | None:
        """The newest checkpoint that is whole. If there are some and none is, that is an error."""
        found = self._steps()
        for path in found:
            state = _read(path)
            if state is not None:
                return path, state
        if found:
            raise QcError(
                f"no checkpoint in {self.folder} is whole: files are missing or changed",
                fix="restore them, or train afresh with resume=False or in another folder",
            )
        return None

    def _steps(self) -> list[Path]:
        named = [p for p in self.folder.glob("step-*") if p.name.removeprefix("step-").isdigit()]
        return sorted(named, key=lambda p: -int(p.name.removeprefix("step-")))

    def _link(self, name: str, target: str) -> None:
        temporary = self.folder / f".{name}.{os.getpid()}.tmp"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        os.replace(temporary, self.folder / name)

    def _drop(self, state: State) -> None:
        kept = 0
        for path in self._steps():
            number = int(path.name.removeprefix("step-"))
            periodic = bool(json.loads((path / "state.json").read_text()).get("periodic"))
            kept += periodic
            if number in (state.step, state.best_step) or (periodic and kept <= self.keep):
                continue
            remove(path)


def load(path: Path, stem: str) -> dict[str, Tensor]:
    """The tensors of one file of a checkpoint."""
    return {name: stored.load() for name, stored in read_header(path / f"{stem}.safetensors").items()}


def same(state: State, identity: Mapping[str, Any], folder: Path) -> None:
    """Refuse to go on with a training that was begun otherwise."""
    for key, now in identity.items():
        before = state.identity.get(key)
        if before != now:
            raise QcError(
                f"{folder} holds a training with another {key}: {_short(before)}, not {_short(now)}",
                fix="train in another folder, or afresh with resume=False",
            )


def _read(path: Path) -> State | None:
    try:
        about = json.loads((path / "state.json").read_text())
        hashes = about.pop("sha256")
        if about.pop("format") != FORMAT or any(sha256(path / name) != digest for name, digest in hashes.items()):
            return None
        about.pop("periodic")
        return State(**about)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _short(value: object) -> str:
    said = json.dumps(value)
    return said if len(said) <= 60 else said[:57] + "…"


def _entry(name: str, value: Tensor) -> Entry:
    here = value.detach().to("cpu").contiguous()
    return Entry(name, tuple(here.shape), here.dtype, lambda: here)
