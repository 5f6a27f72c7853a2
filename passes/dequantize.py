"""Turn packed weights back into float ones.

    before    W/dequantize = qc.dequantize_4bit(W.indices, W.absmax, nf4, model)
              y = linear(x, W/dequantize)
    after     y = linear(x, W)

A latent weight gives way to what it is quantized to: its levels times its scales.

The values are those the packed weight stood for; what packing lost does not come back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from graph import Graph, Site
from graph.formats import dense_value, fused_with, rounded, store_dense, weight_name
from graph.formats.stored import DEQUANTIZE
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

    def run(self, graph: Graph) -> Report:
        """Latent weights that share a global scale with one that goes are changed too: they keep its magnitude."""
        sites = self.select.pick(graph.sites(*self.ops), graph.blocks)
        others = [other.name for site in sites for other in fused_with(graph, weight_name(site))]
        report = super().run(graph)
        return replace(report, changed=tuple(dict.fromkeys([*report.changed, *others])))

    def rewrite(self, graph: Graph, site: Site) -> bool:
        """Unpack the weight of ``site``, and put it in the place of the integers."""
        value = dense_value(graph, site)
        dtype = DTYPES.get(self.dtype, value.dtype)
        store_dense(graph, site, value.to(dtype) if value.is_meta else rounded(value, dtype, weight_name(site)))
        return True
