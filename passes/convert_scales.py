"""Give low-rank scales magnitudes of their own (V1 to V2).

    before    W/dequantize = qc.dequantize_lut(W.indices, W.lut, 1024, model, scale_a=…, scale_b=…, floor=1e-08)
    after     W/dequantize = qc.dequantize_lut(W.indices, W.lut, 1024, model, scale_a=…, scale_b=…, scale_g=…)

``S = max(A B, floor)`` becomes ``S = A diag(g) B`` of unit columns and rows, which a device can factor. Latent weights
are frozen first. The indices are those of the first form, never found anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from graph import Graph, QcError
from graph.formats import Lut, VectorLut, format_of, packed_tensors, weight_name
from graph.formats.lut_convert import freeze_indices, with_magnitudes
from graph.formats.repack import repack, train_scales
from passes.base import Lossy, Pass, Report


@dataclass(frozen=True, kw_only=True)
class ConvertScales(Pass):
    """Turn scales with a floor into scales with magnitudes."""

    contract = Lossy(min_psnr_db=10.0, min_weight_snr_db=10.0)  # exact where no scale lies below the floor
    ops = ("qc.fake_quantize_lut", "qc.dequantize_lut", "qc.fake_quantize_vector_lut", "qc.dequantize_vector_lut")
    idempotent = True

    negative: Literal["refit", "keep"] = "refit"
    """What becomes of a weight some of whose scales lie below the floor: scales refitted to it by least squares, or
    the product as it is, whose negative entries turn weights around."""

    train: Literal["scales", "none"] = "scales"
    """What of them trains from now on, as the group of that name: the scales, or nothing."""

    def check(self, graph: Graph) -> Sequence[QcError]:
        """Weights whose scales are of no rank."""
        try:
            sites = self.select.pick(graph.sites(*self.ops), graph.blocks)
        except QcError as error:
            return [error]
        found = []
        for site in sites:
            form = format_of(site)
            if isinstance(form, (Lut, VectorLut)) and form.scale != "low-rank":
                what = (
                    f"{weight_name(site)} has {'no' if form.scale == 'none' else form.scale} scales, not low-rank ones"
                )
                found.append(QcError(what, fix="exclude it from select", site=site.name))
        return found

    def run(self, graph: Graph) -> Report:
        """Convert one weight after the other; those that have magnitudes already, or are baked, stay."""
        changed, errors, shares = [], [0.0], [0.0]
        for site in self.select.pick(graph.sites(*self.ops), graph.blocks):
            form, packed, name = format_of(site), packed_tensors(graph, site), weight_name(site)
            assert isinstance(form, Lut), f"{site.name} is no LUT weight"
            if form.magnitudes or form.baked:
                continue
            if form.latent:
                frozen = freeze_indices(form, packed)
                form, packed = frozen.form, frozen.packed
            made = with_magnitudes(form, packed, refit=self.negative == "refit")
            changed += repack(graph, site, made.form, made.packed)
            errors.append(made.error)
            shares.append(made.not_positive)
            train_scales(graph, name, self.train == "scales")
        figures = {"weights": len(errors) - 1, "worst_share_not_positive": max(shares), "worst_error": max(errors)}
        return Report(tuple(changed), dict(figures))
