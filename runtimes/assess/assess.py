"""How hard is text for a model, and how do its gradients behave on it, level by level."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graph import Graph, QcError
from runtimes.assess.audit import gradients
from runtimes.assess.crossing import Crossing, crossing
from runtimes.assess.levels import Level
from runtimes.assess.noise import GradientStatistics, statistics
from runtimes.data import Batch
from runtimes.settings import PythonStdlib, Train
from runtimes.train.distribute import Processes
from runtimes.train.student import Student

LEAST = 8
"""Batches that a noise scale is measured over."""


@dataclass(frozen=True)
class LevelFound:
    """What was found of one level."""

    name: str
    tokens: int
    accuracy: float
    """The share of tokens that were the likeliest to the model."""

    gradients: GradientStatistics


@dataclass(frozen=True)
class Assessment:
    """What was found of all levels. The crossing decides; the gradients are there to be looked at."""

    target: float
    tolerance: float
    levels: tuple[LevelFound, ...]
    crossing: Crossing

    def figures(self) -> dict[str, float]:
        """For gates; the level is 0 where nothing is crossed."""
        level = self.crossing.level
        return {"assess/level": 0.0 if level is None else level, "assess/crossed": float(level is not None)}

    def rows(self) -> list[list[str]]:
        """One line a level."""
        return [
            [
                str(number), one.name, f"{one.accuracy:.1%}", f"{one.gradients.noise_scale:.3g}",
                f"{one.gradients.norm:.3g}", f"{one.gradients.element_variance:.3g}", str(one.tokens),
            ]
            for number, one in enumerate(self.levels, 1)
        ]  # fmt: skip

    def write(self, folder: Path) -> None:
        """``assess.json``."""
        found: dict[str, Any] = {**asdict(self), "said": self.crossing.said, "nearest": self.crossing.nearest}
        (folder / "assess.json").write_text(json.dumps(found, indent=1) + "\n")


HEAD = ("level", "text", "accuracy", "noise scale", "gradient norm", "element variance", "tokens")


def assess(
    graph: Graph, levels: Sequence[Level], *, target: float, tolerance: float, micro_batches: int, folder: Path
) -> Assessment:
    """Measure every level, and find where the accuracy crosses ``target``.

    Gradients are those of the next token's loss, by what trains, or by all weights where nothing does, over
    ``micro_batches`` batches of a level's rows. ``folder`` is where Accelerate may put files.
    """
    if graph.kind == "encoder":
        what = "an encoder predicts no tokens, so no text is hard for it"
        raise QcError(what, fix="assess a language model; qc quality compares the vectors of an encoder")
    student = Student(_trainable(graph), Train(data=PythonStdlib(), steps=1, lr=1.0), Processes(folder, ()))
    found = tuple(_level(graph, student, level, micro_batches) for level in levels)
    return Assessment(target, tolerance, found, crossing([one.accuracy for one in found], target, tolerance))


def _trainable(graph: Graph) -> Graph:
    if any(info.trainable for info in graph.tensors().values()):
        return graph
    copy = graph.copy()
    for name, info in copy.tensors().items():
        if info.kind == "parameter" and copy.dtype_of(name).is_floating_point:
            copy.set_info(name, trainable=True)
    return copy


def _level(graph: Graph, student: Student, level: Level, micro_batches: int) -> LevelFound:
    right, tokens = 0, 0
    for batch in level.batches:
        found, count = accuracy(graph, batch)
        right, tokens = right + found, tokens + count
    parts = list(split(level.batches, micro_batches, level.name))
    return LevelFound(level.name, tokens, right / tokens, statistics(gradients(student, part)[1] for part in parts))


def accuracy(graph: Graph, batch: Batch) -> tuple[int, int]:
    """At how many of the measured positions the next token is the likeliest, and how many there are."""
    at = batch.labels >= 0
    with torch.inference_mode():
        device = graph.device
        logits: Tensor = graph(input_ids=batch.input_ids.to(device), attention_mask=batch.attention_mask.to(device))
        hits = logits[at.to(device)].argmax(-1).cpu() == batch.labels[at]
    return int(hits.sum()), int(at.sum())


def split(batches: Sequence[Batch], parts: int, name: str) -> Iterator[Batch]:
    """The rows of some batches of one length, in ``parts`` batches of as equal a size as can be."""
    columns = [
        torch.cat(one) for one in zip(*((b.input_ids, b.attention_mask, b.labels) for b in batches), strict=True)
    ]
    rows = len(columns[0])
    if rows < parts:
        what = f"level {name!r} has {rows} rows, fewer than the {parts} batches that gradients are compared over"
        raise QcError(what, fix="give more batches of text, or fewer levels")
    for part in range(parts):
        yield Batch(*(column[part * rows // parts : (part + 1) * rows // parts] for column in columns))
