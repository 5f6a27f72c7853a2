"""What is minimised: a graph, cut before its head where that can be, and the loss on what comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from graph import Graph, QcError
from runtimes.data import Batch
from runtimes.settings import CausalLm, Embedding, Kd, KdCache, Objective
from runtimes.train.cached import CachedDistillation
from runtimes.train.embedding import EmbeddingLoss
from runtimes.train.losses import Distilled, Features, cross_entropy, distillation


class Loss(Protocol):
    """An objective, ready to run."""

    @property
    def terms(self) -> tuple[str, ...]:
        """The names of the parts of the loss that are logged beside it."""
        ...

    def __call__(self, student: Features, batch: Batch, step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of a batch at optimizer step ``step``, and the terms it has then: fp32 sums over the labels."""
        ...

    def evaluate(self, student: Features, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss on held-out text, and the cross entropy of the text: both in nats, summed over labels."""
        ...


@dataclass(frozen=True)
class Plain:
    """A loss of one term, the same at every step; on held-out text it is the cross entropy that counts."""

    loss: Callable[[Features, Batch], Tensor]
    terms: tuple[str, ...] = ()

    def __call__(self, student: Features, batch: Batch, step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of a batch, at whatever step."""
        return self.loss(student, batch), {}

    def evaluate(self, student: Features, batch: Batch) -> tuple[Tensor, Tensor]:
        """The cross entropy of the text, twice."""
        found = next_token(student, batch)
        return found, found


def cut_head(graph: Graph) -> bool:
    """Make ``graph`` return what its head reads, and the head's weight and bias, instead of the logits.

    False, and the graph unchanged, where the logits are more than one linear: capped, scaled or adapted. An encoder has
    no head.
    """
    if graph.kind == "encoder":
        return False
    (output,) = graph.output_nodes()
    heads = [s for s in graph.sites("aten.linear") if s.node is output]
    if not heads:
        return False
    args = heads[0].node.args
    graph.set_outputs([a for a in args if isinstance(a, fx.Node)])
    return True


def features(outputs: Any, cut: bool) -> Features:
    """What a graph returned, as rows."""
    if not cut:
        return Features(outputs.flatten(0, -2))
    x, weight, *bias = outputs
    return Features(x.flatten(0, -2), weight, bias[0] if bias else None)


def next_token(student: Features, batch: Batch) -> Tensor:
    """Cross entropy of the next token."""
    return cross_entropy(student, batch.labels.flatten())


@dataclass(frozen=True)
class Distillation:
    """Cross entropy mixed with the divergence from a teacher that runs beside the student."""

    settings: Kd
    teacher: Callable[[Batch], Features]

    def __call__(self, student: Features, batch: Batch) -> Tensor:
        with torch.no_grad():
            teacher = self.teacher(batch)
        if teacher.vocabulary != student.vocabulary:
            raise QcError(
                f"the teacher has {teacher.vocabulary} tokens and the student {student.vocabulary}",
                fix="distil from a teacher with the same tokenizer",
            )
        mix = Distilled(teacher, self.settings.temperature, self.settings.alpha)
        return distillation(student, batch.labels.flatten(), mix)


def loss_of(objective: Objective, teacher: Graph | None, dtype: torch.dtype, device: torch.device, steps: int) -> Loss:
    """The loss that ``objective`` asks for; ``teacher`` is a graph of its own and stays as it is."""
    if isinstance(objective, CausalLm):
        return Plain(next_token)
    if isinstance(objective, KdCache):
        return CachedDistillation(objective, steps)
    if teacher is None:
        raise QcError(
            f"the objective {objective.name} needs a teacher, and none was given",
            fix="give the graph before the passes as the teacher",
        )
    twin = teacher.copy().materialize()
    twin.to(dtype, device)
    cut = cut_head(twin)
    twin.module.recompile()

    def run(batch: Batch) -> Features:
        return features(twin(**batch.inputs()), cut)

    return EmbeddingLoss(objective, run) if isinstance(objective, Embedding) else Plain(Distillation(objective, run))
