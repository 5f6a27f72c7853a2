"""Freeze latent ternary weights: keep their integers, in 2 bits or five a byte, and their scales.

    before    W/fake_quantize = qc.fake_quantize_ternary(W.latent, model, dead-zone, 0.1, absmean, 1024)
    after     W/dequantize = qc.dequantize_ternary(W.indices: u8[3072, 256], W.scale: f16[3072, 1], 1024, 2bit, model)

The float weights are dropped. The integers are the weight's own, never those of its scaled values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from graph import Graph, QcError, Site
from graph.apart import Parcel, divided
from graph.formats import Ternary, format_of, packed_tensors, rounded, weight_name
from graph.formats.repack import repack, train_scales
from passes.base import Exact, Lossy, Pass, Report


@dataclass(frozen=True, kw_only=True)
class FreezeTernary(Pass):
    """Keep of each selected latent ternary weight the integers and the scales that it has now."""

    contract = Lossy(min_psnr_db=35.0, min_weight_snr_db=60.0)  # the scales are rounded to fp16
    ops = ("qc.fake_quantize_ternary",)
    idempotent = False  # a second run has nothing to select, and says so

    packing: Literal["2bit", "trit5"] = "2bit"
    """Four weights a byte, or five: 2 bits each, which unpack faster, or 1.6."""

    scale_dtype: Literal["fp16", "fp32"] = "fp16"
    """The dtype of the scales; with fp32 every value stays the same."""

    train: Literal["scales", "none"] = "none"
    """What of them trains from now on, as the group of that name: the scales, or nothing."""

    def __post_init__(self) -> None:
        if self.scale_dtype == "fp32":
            object.__setattr__(self, "contract", Exact())

    def check(self, graph: Graph) -> Sequence[QcError]:
        """Scales that shall train and be in fp16."""
        if self.train == "scales" and self.scale_dtype == "fp16":
            return [QcError("scales in fp16 do not train", fix="set scale_dtype to fp32, and snap them afterwards")]
        return []

    def run(self, graph: Graph) -> Report:
        """Pack the integers of one weight after the other."""
        changed, weights, zeros, size = [], 0, 0, 0
        rules: dict[str, Any] = {}
        sites = [(site, site.value.numel()) for site in self.select.pick(graph.sites(*self.ops), graph.blocks)]
        for site, parcel in divided("freeze", partial(self._packing, graph), sites):
            form, name = _form(site), weight_name(site)
            rules |= {"rule": form.by.rule, "scale": form.by.fit, "shared_by": form.name.removeprefix("ternary, ")}
            rules |= {"tau": form.by.tau} if form.by.tau is not None else {}
            packed = parcel.on(graph.device)
            zeros += parcel.said
            weights += site.value.numel()
            size += sum(side.nbytes for side in packed.values())
            changed += repack(graph, site, self._made(form), packed)
            graph.set_info(f"{name}.scale", trainable=False, group=None)
            train_scales(graph, name, self.train == "scales")
        figures = {"weights": weights, "bytes": size, "bits_per_weight": round(8 * size / weights, 3)}
        return Report(tuple(changed), {**figures, "zero_share": round(zeros / weights, 5), **rules})

    def _made(self, form: Ternary) -> Ternary:
        return replace(form, latent=False, packing=self.packing, baked=self.scale_dtype == "fp16")

    def _packing(self, graph: Graph, site: Site) -> Parcel:
        """The integers and scales of one weight, and how many of its values are 0."""
        form, sides = _form(site), packed_tensors(graph, site)
        grid, latent = form.grid(sides), sides["latent"].detach()
        packed = self._made(form).frozen(grid, latent)
        if not latent.is_meta:
            rounded(grid.scale, packed["scale"].dtype, f"{weight_name(site)}.scale")
        return Parcel(packed, form.zeros(sides))


def _form(site: Site) -> Ternary:
    form = format_of(site)
    assert isinstance(form, Ternary), f"{site.name} is no ternary weight"
    return form
