"""Training one layer after the other, each towards what the layer it came from does with the same input.

The local loss of a layer compares its output y with t, that of the layer before the passes, on the input that the layer
has in the model being trained::

    0.8 MSE(y / rms(y), t / rms(t)) + 0.2 MSE(y, t) / mean(t^2)

Of t the mean counts over a batch, of the rest over its labelled positions. The loss of a step is ``local`` times that
plus ``kd`` times the objective. Each layer begins with an optimizer that remembers nothing, and with the learning rate
where its schedule begins. If a layer starts at more than ``ratio`` times the loss at which the one before it ended,
that one is trained again first. Steps that are left over train all layers together on the objective alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graph import Graph, QcError
from graph.layers import Layer, function_of, layers
from runtimes.data import Batch
from runtimes.settings import Layerwise
from runtimes.train.losses import Features
from runtimes.train.objectives import Loss

COLUMNS = ("layerwise/layer", "layerwise/backtracks")
"""What the metrics have of it: the number of the layer that trains (0: all), and how often one was trained again."""

TINY = 1e-12


def layers_of(graph: Graph, settings: Layerwise) -> list[Layer]:
    """The layers of a graph, in the order in which they train."""
    return [layer for kind in settings.order for layer in layers(graph, kind)]


def local_loss(y: Tensor, t: Tensor, counts: Tensor) -> Tensor:
    """The local loss, a mean: y, t [batch, length, d], of which the positions where ``counts`` is true count."""
    y, t = y[counts].float(), t[counts].float()
    if not len(y):
        return y.sum()
    shapes = (_unit(y) - _unit(t)).square().mean()
    return 0.8 * shapes + 0.2 * (y - t).square().mean() / t.square().mean().clamp(min=TINY)


def _unit(x: Tensor) -> Tensor:
    """Every position divided by its root mean square."""
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


@dataclass(frozen=True)
class LayerLoss:
    """A local loss and an objective, mixed."""

    settings: Layerwise
    objective: Loss
    teachers: Sequence[object]

    @property
    def terms(self) -> tuple[str, ...]:
        """Those of the objective, the objective as a whole, and the local loss."""
        return (*self.objective.terms, "objective", "local")

    def __call__(self, student: Features, batch: Batch, step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss once all layers train together: the objective alone."""
        return self.objective(student, batch, step)

    def evaluate(self, student: Features, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the objective says of held-out text."""
        return self.objective.evaluate(student, batch)

    def of_layer(self, number: int, student: Features, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss while layer ``number`` trains, and its terms: sums over the labels."""
        teacher = self.teachers[number]
        assert callable(teacher)
        x, y = student.layers[number]
        labelled = batch.labels >= 0
        with torch.no_grad():
            t = teacher(x.detach(), input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        local = local_loss(y, t, labelled) * labelled.sum()
        whole, terms = self.objective(student, batch, step)
        named = {**terms, "objective": whole.detach(), "local": local.detach()}
        return self.settings.local * local + self.settings.kd * whole, named


class Layers:
    """Which layer trains, and what became of those before it. All of it is in a checkpoint."""

    def __init__(self, settings: Layerwise, student: Sequence[Layer], trained: Sequence[str], steps: int) -> None:
        self.settings, self.steps = settings, steps
        self.names = [layer.name for layer in student]
        self.tensors = [tuple(name for name in layer.tensors() if name in set(trained)) for layer in student]
        self.at, self.done, self.again = 0, 0, False
        self.first = math.nan
        self.final = [math.nan] * len(self.names)
        self.backtracks = [0] * len(self.names)
        self.began = 0
        self._check(trained)

    def _check(self, trained: Sequence[str]) -> None:
        needed = len(self.names) * self.settings.steps_per_layer
        if needed > self.steps:
            what = f"layer by layer takes {len(self.names)} x {self.settings.steps_per_layer} steps, not {self.steps}"
            raise QcError(what, fix=f"set train.steps to {needed} or more, or lower steps_per_layer")
        empty = next((name for name, own in zip(self.names, self.tensors, strict=True) if not own), None)
        if empty is not None:
            raise QcError(f"nothing in {empty} is trainable", fix="leave its kind out of layerwise.order")
        inside = {name for own in self.tensors for name in own}
        left = [name for name in trained if name not in inside]
        if left and needed == self.steps:
            what = f"no layer trains {left[0]}" + (f" and {len(left) - 1} more" if len(left) > 1 else "")
            raise QcError(what, fix="freeze it with set-trainable, or give train.steps some more, which train all")

    @property
    def current(self) -> str | None:
        """The layer that trains; None once all have, and what trains is everything."""
        return self.names[self.at] if self.at < len(self.names) else None

    def resting(self, trained: Sequence[str]) -> frozenset[str]:
        """The tensors that do not train now."""
        return frozenset(trained) - set(self.tensors[self.at]) if self.current else frozenset()

    def place(self, step: int) -> tuple[int, int]:
        """Where a schedule stands at optimizer step ``step``, and where it ends."""
        if self.current:
            return self.done, self.settings.steps_per_layer
        return step - self.began, self.steps - self.began

    def figures(self) -> dict[str, float]:
        """What is logged of a step."""
        return dict(zip(COLUMNS, (self.at + 1 if self.current else 0, sum(self.backtracks)), strict=True))

    def after(self, step: int, loss: float) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Move on after ``step`` optimizer steps, the last of ``loss``; what to tell, and what is to begin anew."""
        name = self.current
        if name is None:
            return (), ()
        self.first = loss if self.done == 0 else self.first
        self.done += 1
        if self.done == 1 and not self.again and self._goes_back(step, loss):
            self.backtracks[self.at] += 1
            self.at, self.done, self.again = self.at - 1, 0, True
            note = f"step {step}: {name} starts at {loss:.4g}, {self.current} ended at {self.final[self.at]:.4g}"
            return (f"{note}; training that again",), self.tensors[self.at]
        if self.done < self.settings.steps_per_layer:
            return (), ()
        self.final[self.at] = loss
        self.at, self.done, self.again, self.began = self.at + 1, 0, False, step
        following = self.tensors[self.at] if self.current else tuple(name for own in self.tensors for name in own)
        return (f"step {step}: {name} from {self.first:.4g} to {loss:.4g}",), following

    def _goes_back(self, step: int, loss: float) -> bool:
        """Whether the layer before is to be trained again: if that is wanted, and there are steps for it."""
        wanted = self.settings.backtrack
        if wanted is None or self.at == 0 or self.backtracks[self.at] >= wanted.limit:
            return False
        each = self.settings.steps_per_layer
        enough = self.steps - step >= each * (len(self.names) - self.at + 1)
        return enough and loss > wanted.ratio * self.final[self.at - 1]

    def state(self) -> dict[str, Tensor]:
        """All of it, for a checkpoint."""
        numbers = [self.at, self.done, int(self.again), self.began, *self.backtracks]
        losses = torch.tensor([self.first, *self.final], dtype=torch.float64)
        return {"numbers": torch.tensor(numbers, dtype=torch.int64), "losses": losses}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take it from a checkpoint."""
        self.at, self.done, again, self.began, *self.backtracks = state["numbers"].tolist()
        self.again = bool(again)
        self.first, *self.final = state["losses"].tolist()


def layer_loss(
    settings: Layerwise, objective: Loss, teacher: Graph | None, dtype: torch.dtype, device: torch.device
) -> LayerLoss:
    """The loss of a training by layers; ``teacher`` is the graph before the passes, and stays as it is."""
    if teacher is None:
        raise QcError(
            "training layer by layer needs a teacher, and none was given",
            fix="give the graph before the passes as the teacher",
        )
    twin = teacher.copy().materialize()
    twin.to(dtype, device)
    return LayerLoss(settings, objective, [function_of(twin, layer) for layer in layers_of(twin, settings)])
