"""Freeze the indices of latent weights.

    before    W/fake_quantize = qc.fake_quantize_lut(W.latent, W.lut, model, scale_a=…, scale_b=…, floor=1e-08)
    after     W/dequantize = qc.dequantize_lut(W.indices, W.lut, 1024, model, scale_a=…, scale_b=…, floor=1e-08)

    before    W/fake_quantize = qc.fake_quantize_scaled(W.latent, int4, 1, 64, model)
    after     W/dequantize = qc.dequantize_scaled(W.indices, W.scale, int4, model)

The float weights are dropped. Every value stays the same; from here on only levels and scales of LUT weights can move.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from graph import Graph
from graph.formats import Lut, VectorLut, format_of, frozen, packed_tensors, weight_name
from graph.formats.lut_convert import freeze_indices
from graph.formats.repack import repack, train_scales
from passes.base import Exact, Pass, Report


@dataclass(frozen=True, kw_only=True)
class FreezeQ(Pass):
    """Keep of each selected latent weight the indices that it has now."""

    contract = Exact()
    ops = ("qc.fake_quantize_lut", "qc.fake_quantize_vector_lut", "qc.fake_quantize_scaled")
    idempotent = False  # a second run has nothing to select, and says so

    train: Literal["scales", "none"] = "scales"
    """What of LUT weights trains from now on, as the group of that name: the scales, or nothing."""

    def run(self, graph: Graph) -> Report:
        """Pack the indices of one weight after the other."""
        changed, weights = [], 0
        for site in self.select.pick(graph.sites(*self.ops), graph.blocks):
            form, name = format_of(site), weight_name(site)
            weights += 1
            if isinstance(form, Lut):
                made = freeze_indices(form, packed_tensors(graph, site))
                changed += repack(graph, site, made.form, made.packed)
                train_scales(graph, name, self.train == "scales")
            elif isinstance(form, VectorLut):
                changed += repack(graph, site, *form.freeze(packed_tensors(graph, site)))
                train_scales(graph, name, self.train == "scales")
            else:
                changed += repack(graph, site, *frozen(graph, site))
        return Report(tuple(changed), {"weights": weights})
