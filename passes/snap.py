"""Round stored values to the grid of a smaller float type, in the dtype that they have.

    before    y = linear(x, W: f32[…])
    after     y = linear(x, W: f32[…])    every value of W is an fp16 number

An export to that type then loses nothing, and what is evaluated before it is what the export will compute with.

    before    W/dequantize = qc.dequantize_lut(W.indices, W.lut: f32[16], …, scale_a=…, scale_b=…, scale_g: f32[32])
    after     W/dequantize = qc.dequantize_lut(W.indices, W.lut: f16[16], …, scale_a: f16[…], scale_b: f16[…])

A LUT weight all of whose levels and scales are selected is baked, as a device holds it: ``a = fp16(fp16(g) A)`` and
``b = fp16(B)``, of unit columns and rows. Its indices stay, except where levels that trained freely have crossed: those
are put in order and the indices renumbered, so that every weight keeps its level; two that meet move one fp16 step
apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from graph import Graph, QcError, Site, raise_all
from graph.formats import Format, Lut, VectorLut, format_of, packed_sites, packed_tensors, rounded, weight_name
from graph.formats.lut_convert import baked
from graph.formats.repack import repack
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
        picked = self.select.pick(floats, graph.blocks, what="float tensor")
        changed: list[str] = []
        errors: list[QcError] = []
        names = {tensor.name for tensor in picked}
        for site in self._bakes(graph, names):
            changed += _bake(graph, site)
        for tensor in picked:
            if tensor.name not in graph.tensors() or tensor.name in changed:
                continue
            try:
                if self._round(graph, tensor.name):
                    changed.append(tensor.name)
            except QcError as error:
                errors.append(error)
        raise_all(errors)
        return Report(tuple(changed), {"tensors_rounded": len([name for name in changed if name in names])})

    def _bakes(self, graph: Graph, names: set[str]) -> list[Site]:
        """The LUT weights that are to be baked and are not yet."""
        if self.dtype != "fp16":
            return []
        return [
            site
            for site in packed_sites(graph)
            if _can_be_baked(format_of(site))
            if names.issuperset(t for t in site.tensors() if not t.endswith(".indices"))
        ]

    def _round(self, graph: Graph, name: str) -> bool:
        value = graph.tensor(name).detach()
        if value.is_meta:
            return False
        on_grid = rounded(value, GRIDS[self.dtype], name).to(value.dtype)
        if torch.equal(on_grid, value):
            return False
        graph.set_tensor(name, on_grid)
        return True


def _can_be_baked(form: Format) -> bool:
    """Whether it is a LUT weight that is packed and not baked yet; scales with a floor have no product form."""
    if isinstance(form, VectorLut):
        return not (form.baked or form.latent)
    return isinstance(form, Lut) and not (form.baked or form.latent or form.floor is not None)


def _bake(graph: Graph, site: Site) -> list[str]:
    """Store a LUT weight as a device holds it, frozen; the names of the sites and tensors that this changes."""
    form, name = format_of(site), weight_name(site)
    packed = packed_tensors(graph, site)
    new: Format
    if isinstance(form, VectorLut):
        new, made = form.bake(packed)
    else:
        assert isinstance(form, Lut)
        converted = baked(form, packed)
        new, made = converted.form, converted.packed
    sides = [f"{name}.{suffix}" for suffix in made if suffix != "indices"]
    changed = repack(graph, site, new, made)
    for tensor in sides:
        graph.set_info(tensor, trainable=False, group=None)
    return [*changed, *sides]
