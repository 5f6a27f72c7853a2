"""Holding a pass that joins graphs to its contract."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from graph import Graph
from graph.joint import names_of
from graph.probe import probe_inputs, run
from passes.base import Pass
from passes.gradients import dry_run, finite_gradients
from passes.marks import Breach


def joined(step: Pass, graphs: Mapping[str, Graph], made: Graph, batch: int, length: int) -> Iterator[Breach]:
    """Everything in which the joint graph ``made`` is not what was promised of it.

    Gradients reach whatever trains in either model, and without a memory the outputs are those of the decoder.
    """
    yield from dry_run(made, made)
    if any(made.tensor(name).is_meta for name in made.tensors() if name not in made.stored):
        return  # a plan has no numbers
    decoder = graphs[names_of(made).decoder]
    given = probe_inputs(decoder, batch=batch, length=length)
    alone = {name: value for name, value in given.items() if name in made.inputs}
    for old, new in zip(run(decoder, alone), run(made, alone), strict=True):
        if not torch.equal(old, new):
            moved = (old.double() - new.double()).abs().max().item()
            yield Breach(f"without a memory the output moved by up to {moved:.3g}")
    yield from finite_gradients(made)
