"""Merging LoRA sets into the weight beneath them, in whatever form it is stored, and what is left of them there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, fx

from graph.checkpoint import open_checkpoint
from graph.core import Graph, TensorInfo
from graph.errors import QcError
from graph.formats import (
    Lut,
    Ternary,
    VectorLut,
    dense_value,
    format_of,
    packed_tensors,
    rounded,
    store_dense,
    update_packed,
    weight_name,
)
from graph.formats.format import chunks, unpack
from graph.formats.lut_refit import refitted
from graph.formats.repack import repack
from graph.formats.stored import DEQUANTIZE
from graph.lora_base import base_weight, fingerprint, has_values, in_out, weight_tensors
from graph.lora_sets import Update, updates
from graph.moments import take_moments, unused_covariance
from graph.ops import op_name
from graph.sites import Site
from graph.weights import Stored

Into = Literal["full", "dequantized", "requantized"]

SAME_CODES = 0.9
"""Share of its codes that a float weight must give again when it is packed, to be the one that was packed: the other
tenth is for the dtype it may have had then. Another model gives less than a sixth of its 4-bit codes again."""

SAME_SIGNS = 0.75
"""The same for the signs of LUT weights, of which another model gives half again; one of 1 bit and up nearly all."""


@dataclass(frozen=True)
class Kept:
    """What the stored weight has of an update ``d`` of a weight ``w``; ``e`` is the stored weight less ``w + d``."""

    weight: float
    """``|w|²``."""

    update: float
    """``|d|²``."""

    overlap: float
    """``<d + e, d>``."""

    error: float
    """``|e|²``."""

    def __add__(self, other: Kept) -> Kept:
        return Kept(
            self.weight + other.weight,
            self.update + other.update,
            self.overlap + other.overlap,
            self.error + other.error,
        )

    @property
    def survived(self) -> float:
        """The share of the update that is in the stored weight, 1 where there is no update to lose."""
        return self.overlap / self.update if self.update else 1.0

    @property
    def size(self) -> float:
        """``|d| / |w|``."""
        return math.sqrt(self.update / self.weight) if self.weight else 0.0

    @property
    def rounding(self) -> float:
        """``|e| / |d|``; 0 where there is no update."""
        return math.sqrt(self.error / self.update) if self.update else 0.0


def measure(weight: Tensor, total: Tensor, stored: Tensor) -> Kept:
    """Compare, a few rows at a time; weight, total = weight + update, stored: [out, in]."""
    kept = Kept(0, 0, 0, 0)
    for part in chunks(weight):
        w, t = weight[part].float(), total[part].float()
        d, e = t - w, stored[part].float() - t
        products = ((w, w), (d, d), (d + e, d), (e, e))
        kept += Kept(*(float((one * other).sum(dtype=torch.float64)) for one, other in products))
    return kept


def stored_weight(site: Site) -> str | Site:
    """What holds a linear's weight: the name of a float tensor, or the site that unpacks integers."""
    node = site.input(1)
    while node.op == "call_function" and op_name(node.target) == "aten.to.dtype":
        (node,) = node.all_input_nodes
    if node.op == "get_attr":
        return str(node.target)
    packed = Site(site.graph, node)
    if node.op != "call_function" or packed.op not in DEQUANTIZE:
        raise QcError(
            f"the weight of {site.name} is computed by {op_name(node.target)}, not stored",
            fix="merge before the pass that computes it",
            site=site.name,
        )
    return packed


def obstacles(graph: Graph, found: Sequence[Update], into: Into, base: str | None) -> list[QcError]:
    """Why these updates cannot be merged; shapes and structure only."""
    errors, merging = [], {update.a for update in found}
    weights = {update.site.name: stored_weight(update.site) for update in found}
    there, readers = updates(graph), _readers(graph)
    for update in found:
        site, weight = update.site, weights[update.site.name]
        mine = [name for tensor in weight_tensors(graph, site) for name in readers[tensor]]
        others = [name for name in dict.fromkeys(mine) if name != site.name]
        if others:
            what = f"{site.name} shares its weight with {others[0]}, which has no such update"
            errors.append(QcError(what, fix=f"leave {site.name} out of add-lora's select", site=site.name))
        if into == "requantized" and isinstance(weight, str):
            errors.append(
                QcError(
                    f"{weight} is not packed, so it cannot be packed again",
                    fix="set into to dequantized",
                    site=site.name,
                )
            )
        unused = None
        if into == "requantized" and isinstance(weight, Site):
            unused = unused_covariance(graph, weight_name(weight), "merge-lora finds the nearest levels")
        if unused is not None:
            unused.site = site.name
            errors.append(unused)
        left = [u for u in there if u.site.name == site.name and u.a not in merging and u.magnitude is not None]
        if left:
            what = f"set {left[0].set!r} is DoRA's and scales the weight that {update.set!r} would change"
            errors.append(QcError(what, fix=f"merge set {left[0].set!r} too", site=site.name))
    packed = any(isinstance(weight, Site) for weight in weights.values())
    if into == "full" and packed and base is None:
        errors.append(
            QcError(
                "the base is packed, and into: full needs its float weights",
                fix="set base to the model's folder, or into to dequantized",
            )
        )
    if base is not None and not (into == "full" and packed):
        why = "the base is not packed" if into == "full" else f"into: {into} does not read it"
        errors.append(QcError(f"base is given, but {why}", fix="take base out"))
    return errors


def _readers(graph: Graph) -> dict[str, list[str]]:
    """The linears and embeddings that read each tensor, in order."""
    found: dict[str, list[str]] = {}
    for site in graph.sites("aten.linear", "aten.embedding"):
        for tensor in site.tensors():
            found.setdefault(tensor, []).append(site.name)
    return found


def changed_base(graph: Graph, found: Sequence[Update]) -> list[QcError]:
    """The updates that were put on another weight than the one beneath them now."""
    wrong = [
        update
        for update in found
        if has_values(graph, update.site)
        and not torch.equal(fingerprint(graph, update.site).cpu(), graph.tensor(update.base).cpu())
    ]
    if not wrong:
        return []
    more = f" and at {len(wrong) - 1} more" if len(wrong) > 1 else ""
    what = f"set {wrong[0].set!r} was added to another weight than there is now at {wrong[0].site.name}{more}"
    fix = "merge into the base it was trained on, or set force_base to true if you know better"
    return [QcError(what, fix=fix, site=wrong[0].site.name)]


def float_base(graph: Graph, sites: Sequence[Site], folder: str) -> dict[str, Stored]:
    """Where the float weights of packed linears lie in the checkpoint they were packed from, by the linear's name."""
    names, tensors, infos = {}, {}, {}
    for site in sites:
        packed = stored_weight(site)
        if isinstance(packed, Site):
            name = names[site.name] = weight_name(packed)
            inputs, out = in_out(site)
            tensors[name] = torch.empty(out, inputs, device="meta")
            side = graph.info(str(packed.input(0).target))
            infos[name] = TensorInfo(
                transposed=side.transposed, aliases=tuple(a.removesuffix(".indices") for a in side.aliases)
            )
    nodes = fx.Graph()
    nodes.output(None)
    found = open_checkpoint(folder).bind(Graph(nodes, tensors, infos))
    return {site: found[name] for site, name in names.items()}


def read_float_base(graph: Graph, site: Site, stored: Stored, *, force: bool) -> Tensor:
    """The float weight of a packed linear, if packing it gives the packed weight again; in fp32."""
    packed = stored_weight(site)
    assert isinstance(packed, Site)
    weight = stored.load().to(graph.device, graph.dtype)
    same, least, what = likeness(graph, packed, weight)
    if same < least and not force:
        where = f"{stored.key} in {Path(stored.file).name}"
        told = f"{where} is not what {site.name} was packed from: {same:.0%} of the {what} agree"
        raise QcError(
            told,
            fix="set base to the checkpoint that was quantized, or force_base to true if you know better",
            site=site.name,
        )
    return weight.float()


def likeness(graph: Graph, packed: Site, weight: Tensor) -> tuple[float, float, str]:
    """How much of a float weight is in a packed one, how much has to be, and of what.

    Levels and scales of a LUT weight may have been trained since, so of it the signs are compared.
    """
    form, sides = format_of(packed), packed_tensors(graph, packed)
    if isinstance(form, (Lut, VectorLut, Ternary)):
        signs = unpack(form, sides, torch.float32).sign() == weight.float().sign()
        return float(signs.double().mean()), SAME_SIGNS, "signs"
    codes, again = sides["indices"], form.pack(weight)["indices"]
    return float((codes == again.to(codes.device)).double().mean()), SAME_CODES, "codes"


@dataclass(frozen=True)
class Merged:
    """What a merge left of the updates of one linear."""

    kept: Kept

    kept_scales: Kept | None = None
    """What would have been left had the scales of a LUT weight stayed as they were; None for other weights."""


def merge_site(graph: Graph, found: Sequence[Update], into: Into, weight: Tensor | None = None) -> Merged | None:
    """Merge the updates of one linear into its weight, or into ``weight`` in its place; None in a plan.

    The updates' own nodes stay: take them out with ``detach`` when all is merged.
    """
    site = found[0].site
    base = base_weight(graph, site).float() if weight is None else weight
    total = base
    for update in found:
        total = update.merged(total)
    held = stored_weight(site)
    if isinstance(held, str):
        graph.set_tensor(held, _round(total, graph.dtype_of(held), held))
    elif into == "requantized":
        return _requantize(graph, held, base, total)
    else:
        held = store_dense(graph, held, _round(total, graph.dtype, weight_name(held)))
        graph.set_info(held, pinned=False)
        site.set_input(1, graph.read_node(held, before=site.node))
    return None if total.is_meta else Merged(measure(base, total, graph.tensor(held)))


def _requantize(graph: Graph, packed: Site, base: Tensor, total: Tensor) -> Merged | None:
    """Give a packed weight the values ``total``, in the format that it has; a LUT weight moves there from where it is.

    base, total: f32 [out, in]
    """
    form, kept_scales = format_of(packed), None
    if isinstance(form, Lut):
        made = refitted(form, packed_tensors(graph, packed), total, take_moments(graph, weight_name(packed)))
        repack(graph, packed, form, made.packed)
        if not total.is_meta:
            kept_scales = measure(base, total, unpack(form, made.kept_scales, torch.float32))
    elif isinstance(form, VectorLut):
        sides, moments = packed_tensors(graph, packed), take_moments(graph, weight_name(packed))
        update_packed(graph, packed, form.moved(total, sides, moments))
        if not total.is_meta:
            kept_scales = measure(base, total, unpack(form, form.nearest(total, sides), torch.float32))
    else:
        update_packed(graph, packed, form.pack(total))
    stored = dense_value(graph, packed, torch.float32)
    return None if total.is_meta else Merged(measure(base, total, stored), kept_scales)


def _round(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    return value.to(dtype) if value.is_meta else rounded(value, dtype, name)
