"""Multiply in FP8 while training, for selected linears that train.

    before    y = linear(x, W)
    after     y = qc.linear_fp8(x, W, None, training, tensorwise)

Activations, weights and gradients are rounded to FP8 anew at every step; the weights that train stay as
they are. In evaluation nothing changes, to the bit. A linear whose dimensions are no multiples of 16 is left as it is,
and told. GPUs of compute capability 8.9 on have the units for it; elsewhere the same numbers are multiplied in the
dtype of the model, which is slower than without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from graph import Graph, QcError, Selector, Site, raise_all
from graph.fp8_linear import MULTIPLE, linear_fp8
from graph.lora_sets import training_input
from passes.base import Pass, Report, TrainingOnly

TRAINED = Selector(trainable=True)


@dataclass(frozen=True, kw_only=True)
class Fp8Linear(Pass):
    """Compute selected linears in FP8 while they train."""

    contract = TrainingOnly()
    after = ("quantize-base", "add-lora", "insert-gca", "insert-staged-gca", "insert-kv-projection")

    select: Selector = TRAINED
    """Which linears; all that train."""

    scaling: Literal["tensorwise", "rowwise", "none"] = "tensorwise"
    """What shares a scale: a whole tensor, or a row of it, which is nearer and slower, and wants bf16; none: compute as
    before this pass again, for exports that have no form of it."""

    def check(self, graph: Graph) -> Sequence[QcError]:
        """A selection without a linear that can be computed in FP8."""
        try:
            found, left = self._sites(graph)
        except QcError as error:
            return [error]
        if found:
            return []
        what = f"{left[0].name} has a weight of {_shape(left[0])}, of which FP8 multiplies blocks of {MULTIPLE}"
        return [QcError(what, site=left[0].name, fix="select linears of such sizes, or leave fp8-linear out")]

    def _sites(self, graph: Graph) -> tuple[list[Site], list[Site]]:
        """The selected linears that have such sizes, and those that have not."""
        offered = [site for site in graph.sites("aten.linear", "qc.linear_fp8") if site.role != "head"]
        chosen = self.select.pick(offered, graph.blocks, what="linear")
        left = [site for site in chosen if any(size % MULTIPLE for size in _shape(site))]
        return [site for site in chosen if site not in left], left

    def run(self, graph: Graph) -> Report:
        """Rewrite them where they stand."""
        raise_all(list(self.check(graph)))
        found, left = self._sites(graph)
        changed = [site for site in found if self._rewritten(graph, site)]
        figures: dict[str, float | int | str] = {"linears": len(changed)}
        if left:
            figures["left"] = ", ".join(f"{site.name} {_shape(site)}" for site in left)
        return Report(tuple(site.name for site in changed), figures)

    def _rewritten(self, graph: Graph, site: Site) -> bool:
        x, weight, bias, *told = (*site.node.args, None)[:5]
        if self.scaling == "none":
            changes = site.op == "qc.linear_fp8"
            site.node.target = torch.ops.aten.linear.default
            site.node.args = (x, weight) if bias is None else (x, weight, bias)
        else:
            changes = self.scaling not in told
            site.node.target = linear_fp8
            site.node.args = (x, weight, bias, training_input(graph), self.scaling)
        graph.shapes.type_call(site.node)
        return changes


def _shape(site: Site) -> list[int]:
    return list(site.input(1).meta["val"].shape)
