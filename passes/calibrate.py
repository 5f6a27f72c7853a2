"""Measure what linears read, so that their weights are packed where it counts.

    before    y = linear(x, W)
    after     y = linear(x, W)    beside W: W_moments f32 [in], the mean squares of the columns of x

A ``quantize-base`` with the scheme lut behind it fits levels and scales to least squared error of the outputs, columns
taken to be independent: an error of a column counts as often as the column's mean square. So does a ``merge-lora``
that requantizes LUT weights. Whichever packs a weight takes its moments away.

With ``covariance`` the columns are not taken to be independent: W_covariance f32 [in, in] lies beside W too, and
``quantize-base`` rounds one column after another, each making good what those before it lost (GPTQ, arXiv:2210.17323):
packed LUT weights and those of GPU servers (int4, nvfp4, fp8, mxfp4, mxfp8, and int8 in blocks). ``ternary-ste`` with
scales of least squares begins from integers and scales that were found by it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from graph import Graph, QcError, Selector
from graph.formats import weight_name
from graph.lora_base import in_out
from graph.lora_merge import stored_weight
from graph.moments import COVARIANCE, keep_moments, second_moments
from graph.sites import Site
from passes.base import BLOCK_WEIGHTS, Exact, Pass, ReadText, Report


@dataclass(frozen=True, kw_only=True)
class Calibrate(Pass):
    """Run the model on some text, and keep the mean square of every input of the selected linears."""

    contract = Exact()

    read: ClassVar[Any] = None
    """A ``ReadText``, once there is one."""

    select: Selector = BLOCK_WEIGHTS
    """Which linears."""

    data: Any = field(metadata={"data": True})
    """The text; of the standard library, what is not held out."""

    tokens: int = 16384
    """Tokens that are read, in rows of ``length``."""

    length: int = 128
    """Tokens per row."""

    batch: int = 8
    """Rows per forward pass."""

    covariance: bool = False
    """Keep how columns vary together too, to round with feedback: in² · 4 bytes for each input that linears read."""

    def __post_init__(self) -> None:
        for key in ("tokens", "length", "batch"):
            if getattr(self, key) < 1:
                raise QcError(f"{key} is {getattr(self, key)}", fix="give a number from 1")

    def reading(self, read: ReadText) -> Pass:
        """The pass, with where its text comes from."""
        made = replace(self)
        object.__setattr__(made, "read", read)
        return made

    def run(self, graph: Graph) -> Report:
        """Measure all of them at once, each batch in one forward pass."""
        linears = self.select.pick(graph.sites("aten.linear"), graph.blocks)
        weights = {site.name: _weight(site) for site in linears}
        bare = [name for name in graph.tensors() if name not in graph.stored and graph.tensor(name).is_meta]
        seen = self.tokens
        if bare:
            found = {site.name: self._unknown(in_out(site)[0]) for site in linears}
        elif self.read is None:
            raise QcError("calibrate has no text to read", fix="run it from a recipe, or give it text with reading()")
        else:
            batches = self.read(self.data, self.tokens, self.length, self.batch)
            found, seen = second_moments(graph, linears, batches, self.covariance)
        names = []
        for site in linears:
            moments, weight = found[site.name], weights[site.name]
            if self.covariance:
                names.append(keep_moments(graph, weight, site, moments, COVARIANCE))
                moments = moments.diagonal().clone()
            names.append(keep_moments(graph, weight, site, moments))
        return Report(tuple(names), {"linears": len(linears), "tokens": seen})

    def _unknown(self, columns: int) -> torch.Tensor:
        """Of a plan, which has no values."""
        return torch.empty((columns,) * (2 if self.covariance else 1), device="meta")


def _weight(site: Site) -> str:
    held = stored_weight(site)
    return held if isinstance(held, str) else weight_name(held)
