"""Turn packed weights back into float ones.

    before    W/dequantize = qc.dequantize_4bit(W.indices, W.absmax, nf4, model)
              y = linear(x, W/dequantize)
    after     y = linear(x, W)

A latent LUT weight gives way to what it is quantized to: its levels times its scales. A latent ternary weight has no
integers yet, and has to be frozen first. The scales of a frozen one stay beside it, as ``W_ternary_scale``, until
``requantize-ternary`` reads them.

The values are those the packed weight stood for; what packing lost does not come back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from graph import Graph, QcError, Site
from graph.formats import dense_value, fused_with, packed_tensors, rounded, store_dense, weight_name
from graph.formats.stored import DEQUANTIZE
from graph.formats.ternary_again import keep_scale
from passes.base import Exact, Lossy, Pass, Report

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Dequantize(Pass):
    """Store the float weight that each selected packed one stands for, under its old name, frozen."""

    contract = Exact()
    ops = DEQUANTIZE
    idempotent = False  # a second run has nothing to select, and says so

    dtype: Literal["model", "fp32", "bf16", "fp16"] = "model"
    """The dtype of the float weights: the one they are unpacked to anyway, or this one; fp16 and bf16 may round."""

    def __post_init__(self) -> None:
        if self.dtype in ("bf16", "fp16"):
            object.__setattr__(self, "contract", Lossy(min_psnr_db=25.0, min_weight_snr_db=40.0))

    def check(self, graph: Graph) -> Sequence[QcError]:
        """Ternary weights of which there are no integers yet."""
        try:
            sites = self.select.pick(graph.sites(*self.ops), graph.blocks)
        except QcError as error:
            return [error]
        fix = "run freeze-ternary first"
        return [
            QcError(f"{weight_name(site)} is latent: no integers of it are stored", fix=fix, site=site.name)
            for site in sites
            if site.op == "qc.fake_quantize_ternary"
        ]

    def run(self, graph: Graph) -> Report:
        """Latent weights that share a global scale with one that goes are changed too: they keep its magnitude."""
        sites = self.select.pick(graph.sites(*self.ops), graph.blocks)
        others = [other.name for site in sites for other in fused_with(graph, weight_name(site))]
        report = super().run(graph)
        return replace(report, changed=tuple(dict.fromkeys([*report.changed, *others])))

    def rewrite(self, graph: Graph, site: Site) -> bool:
        """Unpack the weight of ``site``, and put it in the place of the integers."""
        value = dense_value(graph, site)
        scale = packed_tensors(graph, site)["scale"] if site.op == "qc.dequantize_ternary" else None
        dtype = DTYPES.get(self.dtype, value.dtype)
        made = value.to(dtype) if value.is_meta else rounded(value, dtype, weight_name(site))
        name = store_dense(graph, site, made)
        if scale is not None:
            keep_scale(graph, name, scale)
        return True
