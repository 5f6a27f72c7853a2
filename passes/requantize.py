"""Put LUT weights on other levels, with more ranks of scales: 16 levels to 4, say.

    before    W/dequantize = qc.dequantize_lut(W.indices: u8[3072, 512], W.lut: f32[16], 1024, …, scale_a=…)
    after     W/dequantize = qc.dequantize_lut(W.indices: u8[3072, 256], W.lut: f32[4], 1024, …, scale_a=…)

Weights that are not selected stay as they are, to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from graph import Graph, QcError, Selector
from graph.formats import Lut, VectorLut, format_of, packed_tensors, weight_name
from graph.formats.lut_convert import requantized
from graph.formats.repack import repack
from passes.base import Lossy, Pass, Report

MLP_WEIGHTS = Selector(role="mlp.*")


@dataclass(frozen=True, kw_only=True)
class Requantize(Pass):
    """Refit levels, indices and scales of each selected LUT weight to the weight that it is now."""

    contract = Lossy(min_psnr_db=0.0, min_weight_snr_db=0.0)  # two bits keep 9 dB of a weight, and noise adds up
    ops = ("qc.dequantize_lut", "qc.dequantize_vector_lut")
    idempotent = False  # each run fits anew

    select: Selector = MLP_WEIGHTS
    """Which weights."""

    bits: Literal[1, 2, 3, 4, 6, 8] = 2
    """Bits of an index: 2 are 4 levels, 4 are 16."""

    rank: int | None = None
    """Rank of the scales; without it, the rank that they have."""

    scales: Literal["refit", "keep"] = "refit"
    """Fit scales along with the levels, or keep them: then new ranks have magnitude 0."""

    def check(self, graph: Graph) -> Sequence[QcError]:
        """Weights without scales that can grow, and ranks that are too small or too large."""
        try:
            sites = self.select.pick(graph.sites(*self.ops), graph.blocks)
        except QcError as error:
            return [error]
        return [problem for site in sites if (problem := self._problem(format_of(site), weight_name(site), site.name))]

    def _problem(self, form: object, weight: str, site: str) -> QcError | None:
        if isinstance(form, VectorLut):
            return QcError(f"{weight} is on vectors, which are not refitted", fix="exclude it from select", site=site)
        assert isinstance(form, Lut), f"{site} is no LUT weight"
        if form.baked:
            return QcError(f"{weight} is baked", fix="requantize before snap", site=site)
        if not form.magnitudes or form.scale != "low-rank":
            return QcError(f"{weight} has no magnitudes in its scales", fix="run convert-scales first", site=site)
        if self.rank is not None and self.rank < form.rank:
            what = f"rank {self.rank} is less than the {form.rank} that {weight} has"
            return QcError(what, fix=f"set rank to {form.rank} or more", site=site)
        return None

    def run(self, graph: Graph) -> Report:
        """Refit one weight after the other."""
        changed, errors = [], [0.0]
        for site in self.select.pick(graph.sites(*self.ops), graph.blocks):
            form = format_of(site)
            assert isinstance(form, Lut)
            rank = self.rank or form.rank
            made = requantized(
                form,
                packed_tensors(graph, site),
                levels=1 << self.bits,
                rank=rank,
                refit_scales=self.scales == "refit",
            )
            changed += repack(graph, site, made.form, made.packed)
            errors.append(made.error)
        return Report(tuple(changed), {"weights": len(errors) - 1, "worst_error": max(errors)})
