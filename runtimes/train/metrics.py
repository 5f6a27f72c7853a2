"""What a training reports of every step: to CSV and JSONL always, to trackers if asked for.

A resumed training first drops the rows behind its checkpoint, so that every step stands there once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from graph import QcError
from runtimes.data.disk import explained, replace_text
from runtimes.train.distribute import Processes

Row = Mapping[str, float | int]

COLUMNS = ("step", "loss", "tokens", "tokens_per_second", "seconds", "grad_norm", "eval_loss", "eval_perplexity")

EXACT = "eval_exact_match"
"""Share of held-out questions that are answered whole; a column where a training asks questions."""


class Metrics:
    """``metrics.csv`` and ``metrics.jsonl`` of one training."""

    def __init__(self, folder: Path, groups: Sequence[str], terms: Sequence[str] = (), figures: Sequence[str] = ()):
        self.folder = folder
        parts = (f"loss/{term}" for term in terms)
        by_group = (f"{kind}/{g}" for kind in ("lr", "grad_norm") for g in groups)
        self.columns = (*COLUMNS, *parts, *by_group, *figures)
        self._files: tuple[TextIO, ...] = ()

    def open(self, step: int) -> None:
        """Go on behind the row of ``step``; 0 begins anew."""
        rows = [row for row in read(self.folder) if int(row["step"]) <= step] if step else []
        table = ",".join(self.columns) + "\n" + "".join(self._csv(row) for row in rows)
        with explained("metrics", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_text(self.folder / "metrics.csv", table)
            replace_text(self.folder / "metrics.jsonl", "".join(_json(row) for row in rows))
            self._files = tuple(
                (self.folder / f"metrics.{kind}").open("a", encoding="utf-8") for kind in ("csv", "jsonl")
            )

    def write(self, row: Row) -> None:
        """Add a row; what it lacks stays empty."""
        assert self._files, "opened first"
        with explained("metrics", self.folder):
            for file, text in zip(self._files, (self._csv(row), _json(row)), strict=True):
                file.write(text)
                file.flush()

    def _csv(self, row: Row) -> str:
        return ",".join(str(row.get(column, "")) for column in self.columns) + "\n"

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()


def _json(row: Row) -> str:
    return json.dumps(row) + "\n"


def read(folder: Path) -> list[dict[str, float]]:
    """The rows of ``metrics.jsonl``; a last line that was cut short is left out."""
    path = folder / "metrics.jsonl"
    rows: list[dict[str, float]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class Trackers:
    """TensorBoard and Weights & Biases, through Accelerate."""

    def __init__(self, processes: Processes, names: Sequence[str], folder: Path, resolved: Mapping[str, Any]):
        self.accelerator = processes.accelerator if names else None
        if self.accelerator is None:
            return
        missing = [name for name in names if not _installed(name)]
        if missing:
            raise QcError(f"the tracker {missing[0]} is not installed", fix="pip install 'qc-compiler[trackers]'")
        (folder / "trackers").mkdir(parents=True, exist_ok=True)
        options = {"wandb": {"dir": str(folder / "trackers"), "mode": _wandb_mode(), "name": folder.name}}
        self.accelerator.init_trackers(
            "qc", config=_flat(resolved), init_kwargs={n: options[n] for n in names if n in options}
        )

    def write(self, row: Row) -> None:
        """Send a row."""
        if self.accelerator is not None:
            self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=int(row["step"]))

    def close(self) -> None:
        """Send the rest."""
        for tracker in self.accelerator.trackers if self.accelerator is not None else ():
            tracker.finish()


def _installed(name: str) -> bool:
    from accelerate.utils import is_tensorboard_available, is_wandb_available

    return bool(is_tensorboard_available() if name == "tensorboard" else is_wandb_available())


def _wandb_mode() -> str | None:
    """What WANDB_MODE says; without it, offline unless there is a key to log in with."""
    if "WANDB_MODE" in os.environ:
        return None
    return None if "WANDB_API_KEY" in os.environ else "offline"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """``{a: {b: 1}}`` -> ``{a.b: 1}``; what trackers cannot hold becomes JSON."""
    flat: dict[str, str | int | float | bool] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = (
                value if isinstance(value, str | int | float | bool) else json.dumps(value, default=str)
            )
    return flat
