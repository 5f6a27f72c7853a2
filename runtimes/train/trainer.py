"""One optimizer step, one evaluation, and all that a checkpoint has to hold."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graph import Graph, QcError
from runtimes.data import Batch
from runtimes.retrieval import Questions
from runtimes.settings import Train
from runtimes.train.auto_snap import COLUMNS, Snapper
from runtimes.train.checkpoints import Tensors, load
from runtimes.train.corpus import Text
from runtimes.train.distribute import Processes, fill, local, whole
from runtimes.train.gates import Gates
from runtimes.train.gradients import Norms, prepare
from runtimes.train.grokfast import SlowGradients
from runtimes.train.groups import Members, memory, optimizer, remember
from runtimes.train.identity import digest, identity
from runtimes.train.layerwise import COLUMNS as LAYER_COLUMNS
from runtimes.train.layerwise import LayerLoss, Layers, layer_loss
from runtimes.train.losses import Features, whole_answers
from runtimes.train.metrics import EXACT
from runtimes.train.objectives import Loss, loss_of
from runtimes.train.report import perplexity
from runtimes.train.routing import RoutedLoss
from runtimes.train.schedules import rate
from runtimes.train.student import Student


@dataclass(frozen=True)
class Step:
    """What a step did, over all processes."""

    loss: float
    """Nats per label."""

    tokens: int
    rows: int
    norms: Norms
    rates: Mapping[str, float]
    terms: Mapping[str, float]
    """Nats per label of each part of the loss, before its weight."""

    figures: Mapping[str, float]
    """What else is logged of it."""

    notes: tuple[str, ...] = ()
    """What is worth telling."""


class Trainer:
    """A student, its optimizer and its text."""

    def __init__(
        self,
        student: Student,
        settings: Train,
        groups: Sequence[Members],
        text: Text,
        processes: Processes,
        *,
        teacher: Graph | None,
        seed: int,
    ):
        self.student, self.settings, self.groups, self.text = student, settings, groups, text
        self.processes, self.seed = processes, seed
        self.start = digest(student.graph, student.parameters)
        self.asks = isinstance(text.evaluation, Questions)
        self.gates = Gates(student.graph, student.parameters)
        self.loss: Loss = loss_of(settings.objective, teacher, student.dtype, processes.device, settings.steps)
        if settings.routing is not None:
            self.loss = RoutedLoss(settings.routing, self.loss)
        self.layers: Layers | None = None
        if settings.layerwise is not None:
            if processes.count > 1:
                raise QcError("layers train one after the other in one process", fix="launch qc train by itself")
            self.loss = layer_loss(settings.layerwise, self.loss, teacher, student.dtype, processes.device)
            self.layers = Layers(settings.layerwise, student.layers, list(student.parameters), settings.steps)
        self.optimizer = optimizer(groups, student.parameters, student.graph, settings.optimizer)
        self.average: dict[str, Tensor] | None = None
        if settings.ema is not None:
            self.average = {name: p.detach().clone() for name, p in student.parameters.items()}
        self.snapper: Snapper | None = None
        if settings.auto_snap is not None:
            trained = [t for t in student.graph.named_tensors() if t.trainable]
            self.snapper = Snapper(settings.auto_snap, trained, student.graph.blocks, groups)
        self.filters: tuple[SlowGradients, ...] = ()
        if settings.grokfast is not None:
            self.filters = (SlowGradients(settings.grokfast, student.parameters),)

    # -- a step -----------------------------------------------------------------------------------------------------

    def step(self, number: int, first_row: int) -> Step:
        """Take optimizer step ``number`` (0 is the first) on the rows from ``first_row`` on."""
        batches = self._batches(first_row)
        counts = [(int((b.labels >= 0).sum()), int((b.attention_mask > 0).sum())) for b in batches]
        labels, tokens = self._sum(sum(n for n, _ in counts), sum(n for _, n in counts))
        if self.layers is not None:
            self.student.rest(self._frozen())
        total, terms = torch.zeros((), device=self.processes.device), dict[str, Tensor]()
        scale = self.processes.count / max(labels, 1)  # gradients are averaged over the processes
        for nth, batch in enumerate(batches):
            self._seed(number, nth)
            with self.processes.accumulating(self.student.module, last=nth == len(batches) - 1):
                here = batch.to(self.processes.device)
                loss, parts = self._loss(self.student(here, True, number / self.settings.steps), here, number)
                torch.autograd.backward(loss * scale)
            total += loss.detach()
            terms = {name: terms.get(name, 0) + part for name, part in parts.items()}
        means = self.processes.sum(torch.stack([total, *terms.values()])) / max(labels, 1)
        value, norms = prepare(
            self._gradients(number), means[0], step=number + 1, clip=self.settings.clip, filters=self.filters,
            reduce=self.processes.sum_shards,
        )  # fmt: skip
        rates = self._set_rates(number)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._follow()
        figures: dict[str, float] = self.gates.figures()
        notes: tuple[str, ...] = ()
        if self.snapper is not None:
            snapped, notes = self.snapper.after(number + 1, self.student.parameters, self.average)
            figures |= snapped
        if self.layers is not None:
            figures |= self.layers.figures()
            notes, anew = self.layers.after(number + 1, value)
            for name in anew:
                self.optimizer.state.pop(self.student.parameters[name], None)
        parted = dict(zip(terms, means[1:].tolist(), strict=True))
        return Step(value, tokens, self._rows_a_pass() * len(batches), norms, rates, parted, figures, notes)

    def _loss(self, features: Features, batch: Batch, number: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of a batch, of the layer that trains if it is but one; a local loss that is no number says whose."""
        if self.layers is None or not self.layers.current:
            return self.loss(features, batch, number)
        assert isinstance(self.loss, LayerLoss)
        loss, terms = self.loss.of_layer(self.layers.at, features, batch, number)
        if not torch.isfinite(terms["local"]):
            raise QcError(
                f"the local loss of {self.layers.current} is {float(terms['local'])} at step {number + 1}",
                fix="lower its learning rate or lengthen the warm-up; the last checkpoint is whole",
            )
        return loss, terms

    def _follow(self) -> None:
        """Move the average a little towards the trained tensors."""
        if self.average is None or self.settings.ema is None:
            return
        average = [local(value) for value in self.average.values()]
        torch._foreach_lerp_(average, [local(p) for p in self.student.parameters.values()], 1 - self.settings.ema)

    def _sum(self, *counts: int) -> list[int]:
        """The sum of each count over all processes."""
        if self.processes.count == 1:
            return list(counts)
        found: list[int] = self.processes.sum(torch.tensor(counts, device=self.processes.device)).tolist()
        return found

    def _rows_a_pass(self) -> int:
        return self.settings.batch * self.processes.count

    def _batches(self, first_row: int) -> list[Batch]:
        """Of the step's rows the part of this process, a batch for each forward pass."""
        size = self.settings.batch
        starts = (
            first_row + nth * self._rows_a_pass() + self.processes.rank * size
            for nth in range(self.settings.accumulate)
        )
        return [self.text.training.shuffled(start, size) for start in starts]

    def _seed(self, step: int, nth: int) -> None:
        """What is random in a forward pass follows from the seed, the step, the pass and the process."""
        if self.student.has_mode:
            said = f"{self.seed} {step} {nth} {self.processes.rank}"
            torch.manual_seed(int.from_bytes(hashlib.sha256(said.encode()).digest()[:8], "little", signed=True))

    def _gradients(self, step: int) -> dict[str, dict[str, Tensor]]:
        """The gradients by group; a group that has not started yet loses its own, and what is frozen by now."""
        found: dict[str, dict[str, Tensor]] = {}
        frozen = self._frozen()
        for member in self.groups:
            named = found[member.name] = {}
            for name in member.tensors:
                parameter = self.student.parameters[name]
                if step < member.group.start_step or name in frozen:
                    parameter.grad = None
                elif parameter.grad is not None:
                    named[name] = parameter.grad
        return found

    def _frozen(self) -> frozenset[str]:
        """The tensors that trained and do no more, or that wait for their turn."""
        if self.layers is not None:
            return self.layers.resting(list(self.student.parameters))
        return frozenset(self.snapper.names if self.snapper is not None and self.snapper.frozen else ())

    def _set_rates(self, step: int) -> dict[str, float]:
        place, end = self.layers.place(step) if self.layers is not None else (step, self.settings.steps)
        rates = {m.name: rate(m.group, place, end) for m in self.groups}
        for entry in self.optimizer.param_groups:
            entry["lr"] = rates[entry["group"]]
        return rates

    # -- an evaluation ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> dict[str, float] | None:
        """Loss in nats per label and perplexity on held-out text, of the average if there is one; None without text.

        Of questions also the share of answers of which every token is the likeliest.
        """
        rows = self.text.evaluation
        if rows is None:
            return None
        size, found = self.settings.batch, torch.zeros(5, dtype=torch.float64, device=self.processes.device)
        with self._averaged():
            for nth in range(self.settings.eval_batches):
                first = nth * self._rows_a_pass() + self.processes.rank * size
                numbers = range(min(first, len(rows)), min(first + size, len(rows)))
                if not numbers and not self.processes.sharded:
                    break
                batch = rows.batch(numbers or range(1)).to(self.processes.device)
                if numbers:
                    features = self.student(batch, training=False)
                    found[:2] += torch.stack(self.loss.evaluate(features, batch))
                    found[2] += (batch.labels >= 0).sum()
                    if self.asks:
                        right = whole_answers(features, batch.labels, batch.attention_mask)
                        found[3:] += torch.tensor(right, device=found.device)
                else:  # the shards are gathered by all processes together
                    self.student(batch, training=False)
        loss, text, labels, right, asked = self.processes.sum(found).tolist()
        figures = {"eval_loss": loss / max(labels, 1)}
        figures |= {} if math.isnan(text) else {"eval_perplexity": perplexity(text / max(labels, 1))}
        return figures | ({EXACT: right / max(asked, 1)} if self.asks else {})

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Inside, the trained tensors have the values of the average."""
        if self.average is None:
            yield
            return
        parameters = [local(p) for p in self.student.parameters.values()]
        kept = [p.clone() for p in parameters]
        torch._foreach_copy_(parameters, [local(value) for value in self.average.values()])
        try:
            yield
        finally:
            torch._foreach_copy_(parameters, kept)

    @property
    def figures(self) -> tuple[str, ...]:
        """The names of what a step may log beside its loss."""
        asked = (EXACT,) if self.asks else ()
        snapped = COLUMNS if self.snapper is not None else ()
        return (*asked, *self.gates.columns, *snapped, *(LAYER_COLUMNS if self.layers is not None else ()))

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def tensors(self) -> Tensors:
        """All that a checkpoint holds; where tensors are sharded, every process must ask."""
        found = {
            "trained": {name: whole(p) for name, p in self.student.parameters.items()},
            "optimizer": {name: whole(value) for name, value in memory(self.optimizer).items()},
        }
        if self.average is not None:
            found["average"] = {name: whole(value) for name, value in self.average.items()}
        return found | {stem: part.state() for stem, part in self._memories().items()}

    def load(self, path: Path) -> None:
        """Take everything from a checkpoint."""
        self.student.load(load(path, "trained"))
        remember(self.optimizer, self.student.parameters, load(path, "optimizer"))
        if self.average is not None:
            for name, value in load(path, "average").items():
                fill(self.average[name], value)
        for stem, part in self._memories().items():
            part.load(load(path, stem))

    def _memories(self) -> dict[str, Snapper | Layers | SlowGradients]:
        """What else remembers something, by the file of a checkpoint that holds it."""
        there = {"auto_snap": self.snapper, "layerwise": self.layers, "grokfast": next(iter(self.filters), None)}
        return {stem: part for stem, part in there.items() if part is not None}

    def give_back(self) -> None:
        """Put the result, the average if there is one, into the graph; what was frozen on the way stays so."""
        result = self.student.parameters if self.average is None else self.average
        self.student.give_back({name: whole(value) for name, value in result.items()})
        for name in self._frozen() if self.snapper is not None else ():
            self.student.graph.set_info(name, trainable=False, group=None)

    def last_words(self) -> tuple[str, ...]:
        """What should be known of the whole training."""
        return () if self.snapper is None else self.snapper.last_words()

    def identity(self) -> dict[str, Any]:
        """What must be the same for a training to go on."""
        rows = self.text.training
        return identity(
            self.settings,
            self.groups,
            batch=self._rows_a_pass(),
            seed=self.seed,
            data=rows.key,
            start=self.start,
        )
