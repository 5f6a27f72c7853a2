"""Rounding tensors to the fp16 grid, and freezing them there, once they have come to rest.

A device holds the magnitudes of low-rank scales in fp16, whose steps near 150 are an eighth wide. Rounded while the
rest of the weights still trains, they cost nothing that the rest does not make up for.

Every so many steps each value is compared with what it was at the look before. The change is relative to the value,
for magnitudes span decades: ``|new - old| / |old|``, where what is below a thousandth of the largest value of its
tensor counts as that thousandth. How much moves between two looks depends on their distance and on the learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from graph import NamedTensor, Selector
from graph.formats.ste import to_fp16
from runtimes.settings import AutoSnap
from runtimes.train.distribute import fill, whole
from runtimes.train.groups import Members, pick

MAGNITUDES = Selector(name="*.scale_g")

SMALL = 1e-3
"""Share of a tensor's largest value below which a value's own size says nothing of its change."""

COLUMNS = ("auto_snap/change", "auto_snap/resting", "auto_snap/frozen")
"""What the metrics have of it: the largest change, the looks in a row below the threshold, and 1 once it is done."""


class Snapper:
    """What is looked at, and what was seen. All of it is in a checkpoint, so a resumed training snaps as it would have.

    Every process of a training holds one and decides the same.
    """

    def __init__(
        self, settings: AutoSnap, trainable: Sequence[NamedTensor], blocks: int, groups: Sequence[Members]
    ) -> None:
        self.settings = settings
        self.names = pick(settings.select or MAGNITUDES, trainable, blocks, "auto_snap")
        begun = [member.group.start_step for member in groups if set(member.tensors) & set(self.names)]
        self.start = max(settings.start, *begun)
        self.seen: dict[str, Tensor] = {}
        self.resting, self.frozen = 0, False

    def after(
        self, step: int, parameters: Mapping[str, Tensor], average: Mapping[str, Tensor] | None
    ) -> tuple[dict[str, float], tuple[str, ...]]:
        """Look, if it is time after ``step`` optimizer steps; snap, if all rest. What to log of that, and to tell.

        What is frozen stays in the optimizer, which passes over tensors without a gradient: so nothing is forgotten
        of the others. The average gets the same values, for it is what the training gives.
        """
        since = step - self.start
        if self.frozen or since < self.settings.every or since % self.settings.every:
            return {COLUMNS[2]: float(self.frozen)}, ()
        values = {name: whole(parameters[name]).clone() for name in self.names}
        change = max(relative_change(self.seen[n], value) for n, value in values.items()) if self.seen else None
        self.seen = values
        if change is None:
            return {COLUMNS[2]: 0.0}, ()
        self.resting = self.resting + 1 if change < self.settings.threshold else 0
        if snaps := self.resting >= self.settings.patience:
            self._snap(parameters)
            self._snap(average or {})
        note = f"step {step}: {len(self.names)} tensors rest; rounded to fp16 and frozen"
        return dict(zip(COLUMNS, (change, self.resting, float(snaps)), strict=True)), (note,) if snaps else ()

    def _snap(self, tensors: Mapping[str, Tensor]) -> None:
        """Round, where they lie, those of ``tensors`` that are looked at."""
        self.frozen = True
        for name in (name for name in self.names if name in tensors):  # all processes in one order
            fill(tensors[name], to_fp16(self.seen[name]))

    def last_words(self) -> tuple[str, ...]:
        """What should be known at the end of the training."""
        return () if self.frozen else ("auto_snap: nothing was rounded, for it never came to rest",)

    def state(self) -> dict[str, Tensor]:
        """Its state."""
        return {"resting": torch.tensor(self.resting), "frozen": torch.tensor(self.frozen), **self.seen}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take its state from a checkpoint."""
        self.resting, self.frozen = int(state["resting"]), bool(state["frozen"])
        self.seen = {name: state[name] for name in self.names if name in state}


def relative_change(old: Tensor, new: Tensor) -> float:
    """The largest change of a value, relative to the value as it was."""
    was, now = old.detach().double().cpu(), new.detach().double().cpu()
    size = was.abs()
    floor = max(float(size.max()) * SMALL, torch.finfo(torch.float32).tiny)
    return float(((now - was).abs() / size.clamp(min=floor)).max())
