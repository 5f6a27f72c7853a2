"""Whether gradients reach everything that trains, and are those of the loss.

One forward and one backward of the next token's loss on real text, as a training does it. Every tensor that trains has
to get a gradient that is finite and not all zero. A tensor that is read as it is has to have the gradient that the loss
really has, by its difference along the gradient; where a rounding passes gradients straight through, the loss has
steps, and there is nothing to compare with.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from graph import Graph, QcError
from graph.formats.tokens import with_plain_tokens
from graph.ops import op_name
from runtimes.data import Batch
from runtimes.settings import PythonStdlib, Train
from runtimes.train.distribute import Processes
from runtimes.train.objectives import next_token
from runtimes.train.student import Student

TOLERANCE = 0.05
"""How far the difference of the loss may be from the gradient, as a share."""

SEEN = 1e-4
"""Changes of the loss below this are lost in fp32."""

STRAIGHT = ("qc.fake_quantize", "qc.ste")
"""Beginnings of the ops that pass gradients straight through a rounding."""


@dataclass(frozen=True)
class Difference:
    """The gradient of one tensor, beside what the loss does."""

    name: str
    gradient: float
    """Of the loss, along its own direction: its norm."""

    measured: float
    """(loss(w + h d) - loss(w - h d)) / 2h, for that direction d."""

    @property
    def agrees(self) -> bool:
        """Whether both are the same but for rounding."""
        return abs(self.measured - self.gradient) <= TOLERANCE * abs(self.gradient)


@dataclass(frozen=True)
class Audit:
    """What was found."""

    loss: float
    norms: Mapping[str, float]
    """Tensor -> norm of its gradient; NaN where that is not finite."""

    straight: tuple[str, ...]
    """Tensors that are read through a rounding."""

    differences: tuple[Difference, ...]

    @property
    def dead(self) -> tuple[str, ...]:
        """Tensors that train and get no gradient, or one of zeros."""
        return tuple(name for name, norm in self.norms.items() if norm == 0)

    @property
    def broken(self) -> tuple[str, ...]:
        """Tensors whose gradient is not finite."""
        return tuple(name for name, norm in self.norms.items() if norm != norm)

    @property
    def passed(self) -> bool:
        """Whether everything is as it should be."""
        return not self.dead and not self.broken and all(one.agrees for one in self.differences)

    def figures(self) -> dict[str, float]:
        """For gates."""
        return {
            "gradient_flow/passed": float(self.passed),
            "gradient_flow/tensors": len(self.norms),
            "gradient_flow/dead": len(self.dead) + len(self.broken),
        }

    def said(self) -> str:
        """In a few lines."""
        lines = [f"gradients reach {len(self.norms) - len(self.dead) - len(self.broken)} of {len(self.norms)} tensors"]
        lines += [f"no gradient: {name}" for name in self.dead]
        lines += [f"not finite: {name}" for name in self.broken]
        for one in self.differences:
            word = "as the loss has it" if one.agrees else "not what the loss has"
            lines.append(f"{one.name}: gradient {one.gradient:.4g}, difference {one.measured:.4g}, {word}")
        if self.straight:
            lines.append(
                f"{len(self.straight)} tensors are read through a rounding, which has no difference to compare"
            )
        return "\n".join(lines)


def audit(graph: Graph, batch: Batch, *, folder: Path, spots: int = 3) -> Audit:
    """Audit what trains in ``graph`` on a batch of text; ``spots`` tensors are compared with differences.

    ``folder`` is where Accelerate may put files. Where the graph rounds its tokens, the differences are of the graph
    without that.
    """
    if not any(info.trainable for info in graph.tensors().values()):
        raise QcError("nothing in the graph trains", fix="say what does with set-trainable, or train: of a pass")
    student = _student(graph, folder)
    loss, found = gradients(student, batch)
    norms = {name: _norm(value) for name, value in found.items()}
    straight = tuple(name for name in found if _is_straight(graph, name))
    smooth = with_plain_tokens(graph)
    checked = _spread([n for n in found if n not in straight and _is_seen(student.parameters[n], norms[n])], spots)
    if smooth is not graph and checked:
        student = _student(smooth, folder)
        _, found = gradients(student, batch)
    return Audit(loss, norms, straight, tuple(_difference(student, batch, name, found[name]) for name in checked))


def _student(graph: Graph, folder: Path) -> Student:
    return Student(graph, Train(data=PythonStdlib(), steps=1, lr=1.0), Processes(folder, ()))


def gradients(student: Student, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """The loss of a batch in nats per label, and its gradient by trained tensor; zeros where there is none."""
    loss = _loss(student, batch)
    tensors = student.parameters
    found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    named = zip(tensors.items(), found, strict=True)
    return float(loss.detach()), {n: torch.zeros_like(p) if g is None else g.detach() for (n, p), g in named}


def _loss(student: Student, batch: Batch) -> Tensor:
    here = batch.to(student.processes.device)
    return next_token(student(here, training=True), here) / (here.labels >= 0).sum().clamp(min=1)


def _norm(value: Tensor) -> float:
    """NaN where anything in it is not finite."""
    norm = float(value.double().norm())
    return norm if norm - norm == 0 else float("nan")


def _is_straight(graph: Graph, name: str) -> bool:
    readers = (n for n in graph.module.graph.nodes if n.op == "get_attr" and n.target == name)
    users = [user for reader in readers for user in reader.users if user.op == "call_function"]
    return any(op_name(user.target).startswith(STRAIGHT) for user in users)


def _spread(names: Sequence[str], spots: int) -> list[str]:
    """``spots`` of the names, from the first to the last."""
    wanted = min(spots, len(names))
    return [names[round(n * (len(names) - 1) / max(wanted - 1, 1))] for n in range(wanted)]


def _step(tensor: Tensor, norm: float) -> float:
    """How far to move a tensor along its gradient: the loss changes by 0.01, the tensor by a fiftieth."""
    size = max(float(tensor.detach().double().norm()), 0.01 * math.sqrt(tensor.numel()))
    return min(0.01 / norm, 0.02 * size)


def _is_seen(tensor: Tensor, norm: float) -> bool:
    """Whether the loss changes by more than fp32 loses of it."""
    return norm > 0 and norm * _step(tensor, norm) >= SEEN


@torch.no_grad()
def _difference(student: Student, batch: Batch, name: str, gradient: Tensor) -> Difference:
    """Move the tensor along its gradient, both ways."""
    tensor, norm = student.parameters[name], float(gradient.double().norm())
    direction, was = gradient / norm, tensor.detach().clone()
    step, found = _step(tensor, norm), list[float]()
    while not found or (norm * step >= SEEN and len(found) < 6):
        ends = []
        for sign in (1, -1):
            tensor.copy_(was + sign * step * direction)
            ends.append(float(_loss(student, batch)))
        found.append((ends[0] - ends[1]) / (2 * step))
        step /= 4
    tensor.copy_(was)
    return Difference(name, norm, _settled(found))


def _settled(found: Sequence[float]) -> float:
    """Of differences with ever smaller steps the one that is nearest to the one before: steps too large bend."""
    if len(found) == 1:
        return found[0]
    return min(itertools.pairwise(found), key=lambda pair: abs(pair[1] - pair[0]))[1]
