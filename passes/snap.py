"""Round stored values to the grid of a smaller float type, in the dtype that they have.

    before    y = linear(x, W: f32[…])
    after     y = linear(x, W: f32[…])    every value of W is an fp16 number

An export to that type then loses nothing, and what is evaluated before it is what the export will compute with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from graph import Graph, QcError, raise_all
from graph.formats import rounded
from passes.base import Lossy, Pass, Report

GRIDS = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Snap(Pass):
    """Round every selected float tensor; integers have a grid already and are passed over.

    ``select`` goes over tensors here, by their own names, and their roles are those of the ops that read them.
    """

    contract = Lossy(min_psnr_db=40.0, min_weight_snr_db=50.0)

    dtype: Literal["fp16", "bf16"] = "fp16"
    """The grid. A value beyond the range of fp16 is an error that names it."""

    def __post_init__(self) -> None:
        if self.dtype == "bf16":
            object.__setattr__(self, "contract", Lossy(min_psnr_db=25.0, min_weight_snr_db=40.0))

    def run(self, graph: Graph) -> Report:
        """Round one tensor after the other; those that are on the grid are not touched."""
        floats = [t for t in graph.named_tensors() if t.info.saved and graph.dtype_of(t.name).is_floating_point]
        changed: list[str] = []
        errors: list[QcError] = []
        for tensor in self.select.pick(floats, graph.blocks, what="float tensor"):
            try:
                if self._round(graph, tensor.name):
                    changed.append(tensor.name)
            except QcError as error:
                errors.append(error)
        raise_all(errors)
        return Report(tuple(changed), {"tensors_rounded": len(changed)})

    def _round(self, graph: Graph, name: str) -> bool:
        value = graph.tensor(name).detach()
        if value.is_meta:
            return False
        on_grid = rounded(value, GRIDS[self.dtype], name).to(value.dtype)
        if torch.equal(on_grid, value):
            return False
        graph.set_tensor(name, on_grid)
        return True
