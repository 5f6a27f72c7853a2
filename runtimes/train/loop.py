"""The loop: batches in, trained tensors out.

What happens in optimizer step ``s`` follows from the settings, the seed and ``s``: its rows, its learning rates, its
dropout. So a checkpoint needs the tensors and the optimizer's memory only, and a resumed training ends in the same
bytes (on a CPU with the same number of threads).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from graph import Graph, QcError
from graph.hashes import sha256
from runtimes.data.disk import sweep
from runtimes.settings import Kd, Train
from runtimes.train import plot
from runtimes.train.checkpoints import Checkpoints, State, same
from runtimes.train.corpus import open_text
from runtimes.train.distribute import Processes
from runtimes.train.divergence import Watch
from runtimes.train.groups import members
from runtimes.train.memory import dense_bytes
from runtimes.train.metrics import Metrics, Row, Trackers, read
from runtimes.train.progress import Progress, Silent, terminal
from runtimes.train.report import TrainReport
from runtimes.train.student import Student, check
from runtimes.train.trainer import Trainer


def train(
    graph: Graph,
    settings: Train,
    *,
    tokenizer: Any,
    folder: Path,
    teacher: Graph | None = None,
    seed: int = 0,
    resolved: Mapping[str, Any] | None = None,
    resume: bool = True,
    root: Path = Path(),
    cache: Path | None = None,
    progress: Progress | None = None,
    memory_tokenizer: Any = None,
) -> TrainReport:
    """Train what is trainable in ``graph``, in place, and leave metrics, checkpoints and a plot in ``folder``.

    ``teacher`` is the graph before the passes, for the objective kd. ``resolved`` is the recipe with every default
    written out: it goes to the trackers. Relative paths of the data start at ``root``; tokens are kept in ``cache``,
    or in the folder. ``memory_tokenizer`` is that of an encoder in the graph; without it, its chunks are read by
    ``tokenizer``. If the folder holds a training with the same settings it goes on from its last checkpoint.
    """
    seed = settings.seed if settings.seed is not None else seed
    check(graph, settings)
    groups = members(graph, settings)
    processes = Processes(folder, settings.trackers)
    if processes.main:
        for own in (folder, folder / "data"):  # what a killed run left half-written
            sweep(own)
    with processes.main_first():
        text = open_text(
            settings,
            tokenizer=tokenizer,
            root=root,
            cache=cache or folder / "data",
            seed=seed,
            processes=processes.count,
            memory_tokenizer=memory_tokenizer,
        )
    generator = torch.random.get_rng_state()
    try:
        beside = 0 if teacher is None or settings.memory is None else dense_bytes(teacher)
        student = Student(graph, settings, processes, beside)
        trainer = Trainer(student, settings, groups, text, processes, teacher=teacher, seed=seed)
        session = _Session(trainer, folder, resume, (progress or terminal()) if processes.main else Silent())
        return session.run(resolved or {})
    finally:
        torch.random.set_rng_state(generator)


class _Session:
    """One run of a training: from its last checkpoint, or its beginning, to the end."""

    def __init__(self, trainer: Trainer, folder: Path, resume: bool, progress: Progress):
        self.trainer, self.folder, self.progress = trainer, folder, progress
        self.settings, self.processes = trainer.settings, trainer.processes
        self.identity = trainer.identity()
        self.checkpoints = Checkpoints(folder / "checkpoints", self.settings.keep)
        if self.processes.main:
            self.checkpoints.start(fresh=not resume)
        self.processes.wait()
        found = self.checkpoints.newest()
        self.state = State(identity=self.identity)
        if found is not None:
            path, self.state = found
            same(self.state, self.identity, folder)
            trainer.load(path)
        if not self.processes.agree(self.state.step):
            raise QcError(f"the processes find different checkpoints in {folder}", fix="give all machines one folder")
        if not self.processes.agree(int(trainer.start[:6], 16)):
            raise QcError("the processes train different models", fix="give all machines the same artifact")
        self.resumed_from = self.state.step
        known = [row["loss"] for row in read(folder) if row["step"] <= self.state.step] if self.state.step else []
        self.watch = Watch(self.settings.divergence, known)

    def run(self, resolved: Mapping[str, Any]) -> TrainReport:
        trainer = self.trainer
        metrics = Metrics(self.folder, [m.name for m in trainer.groups], trainer.loss.terms, trainer.figures)
        trackers = Trackers(self.processes, self.settings.trackers, self.folder, resolved)
        try:
            if self.processes.main:
                metrics.open(self.state.step)
            self.progress.begin(self.settings.steps, self.state.step)
            for note in (*self.trainer.text.notes, *self.trainer.student.notes):
                self.progress.note(note)
            while self.state.step < self.settings.steps and not self.watch.runs_away:
                row = self._step()
                if self.processes.main:
                    metrics.write(row)
                trackers.write(row)
                self.progress.step(row)
                self._save()
        finally:
            self.progress.end()
            metrics.close()
            trackers.close()
        return self._finish()

    def _step(self) -> Row:
        began, before = time.perf_counter(), self.state
        done = self.trainer.step(before.step, before.rows)
        took = time.perf_counter() - began
        row: dict[str, float | int] = {
            "step": before.step + 1,
            "loss": done.loss,
            "tokens": before.tokens + done.tokens,
        }
        row |= {"tokens_per_second": round(done.tokens / took, 1), "grad_norm": done.norms.total}
        row |= {f"loss/{name}": value for name, value in done.terms.items()}
        row |= {f"lr/{name}": lr for name, lr in done.rates.items()}
        row |= {f"grad_norm/{name}": norm for name, norm in done.norms.groups.items()}
        row |= done.figures
        for note in done.notes:
            self.progress.note(note)
        every = self.settings.eval_every
        due = row["step"] == self.settings.steps or (every and int(row["step"]) % every == 0)
        best = (before.best_step, before.best_loss)
        if due and (evaluated := self.trainer.evaluate()) is not None:
            row |= evaluated
            if best[1] is None or evaluated["eval_loss"] < best[1]:
                best = (int(row["step"]), evaluated["eval_loss"])
        self.watch.see(done.loss)
        row["seconds"] = round(before.seconds + time.perf_counter() - began, 3)
        self.state = replace(
            before, step=int(row["step"]), rows=before.rows + done.rows, tokens=before.tokens + done.tokens,
            seconds=row["seconds"], best_step=best[0], best_loss=best[1],
        )  # fmt: skip
        return row

    def _save(self) -> None:
        """Write a checkpoint if one is due: periodically, when it is the best, and at the end."""
        step, every = self.state.step, self.settings.save_every
        periodic = bool(every) and step % every == 0
        if not (periodic or step == self.settings.steps or step == self.state.best_step):
            return
        tensors = self.trainer.tensors()
        if self.processes.main:
            self.checkpoints.save(self.state, tensors, periodic)
        self.processes.wait()

    def _go_back(self) -> Path:
        """Take everything from the best checkpoint that there is, or else from the newest."""
        best = self.state.best_step
        found = self.checkpoints.newest()
        if best is None and found is None:
            fix = "lower the learning rate, or set save_every or eval_every below that step"
            raise QcError(f"{self.watch.said()}, and there is no checkpoint to go back to", fix=fix)
        path = self.folder / "checkpoints" / f"step-{best}" if best is not None else found[0] if found else self.folder
        self.trainer.load(path)
        return path

    def _finish(self) -> TrainReport:
        trainer, rows = self.trainer, read(self.folder)
        notes = [*trainer.text.notes, *trainer.student.notes, *trainer.last_words()]
        path = self.folder / "checkpoints" / f"step-{self.state.step}"
        if self.watch.runs_away:
            path = self._go_back()
            notes.append(f"{self.watch.said()}; what is returned is {path.name} of the checkpoints")
            self.progress.note(notes[-1])
        self.trainer.give_back()
        if self.settings.plot and self.processes.main:
            taught = isinstance(self.settings.objective, Kd)  # a divergence, where held-out text has its own tokens
            heldout = "held-out text: the next token" if taught else "held-out text"
            note = plot.draw(rows, self.folder / "loss.png", self.folder.name, heldout)
            if note:
                notes.append(note)
                self.progress.note(note)
        state, last = self.state, rows[-1]
        return TrainReport(
            steps=state.step, tokens=state.tokens, seconds=state.seconds, first_loss=rows[0]["loss"],
            last_loss=last["loss"], eval_loss=last.get("eval_loss"), eval_perplexity=last.get("eval_perplexity"),
            best_step=state.best_step, best_loss=state.best_loss, checkpoint=path,
            sha256=sha256(path / "trained.safetensors"), resumed_from=self.resumed_from, notes=tuple(notes),
        )  # fmt: skip
