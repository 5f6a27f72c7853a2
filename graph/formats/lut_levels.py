"""Levels of a LUT weight that train, and that are levels after every step.

    stored    W/dequantize = qc.dequantize_lut(W.indices, W.lut, …)
    derived   W/levels = qc.monotone_levels(W.theta, 1.0)
              W/dequantize = qc.dequantize_lut(W.indices, W/levels, …)

Derived ones stay symmetric, strictly increasing, fp16 numbers and other than zero, whatever ``theta`` becomes. Stored
ones may train too, freely: then ``in_order`` makes levels of them again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from graph.core import Graph
from graph.formats.bits import bits_for, pack_bits, unpack_bits
from graph.formats.format import has_data
from graph.formats.levels import fp16_levels, largest_level, monotone_levels, theta_of
from graph.formats.lut_weight import level_starts
from graph.formats.stored import arguments, weight_name
from graph.probe import evaluate_constant
from graph.sites import Site, tag


@dataclass(frozen=True)
class Theta:
    """What levels followed from."""

    theta: Tensor
    largest: float
    levels: Tensor


def derive_levels(graph: Graph, site: Site, trained: Theta | None = None) -> str:
    """Let the stored levels of a weight follow from ``theta``; its name. If they are those of ``trained``, from that.

    Symmetric levels only, each table to the same largest level.
    """
    name, stored = weight_name(site), arguments(site)["lut"]
    levels, info = graph.tensor(f"{name}.lut").detach(), graph.info(f"{name}.lut")
    if trained is None or not _same(levels, trained.levels):
        trained = Theta(theta_of(levels), largest_level(levels), levels)
    aliases = tuple(f"{alias.rpartition('.')[0]}.theta" for alias in info.aliases)
    made = replace(info, kind="parameter", aliases=aliases)
    theta = graph.add_tensor(f"{name}.theta", trained.theta, before=site.node, info=made)
    role = str(tag(site.node, "role", "other"))
    derived = graph.insert(monotone_levels, theta, trained.largest, name=f"{name}/levels", before=site.node, role=role)
    site.node.replace_input_with(stored, derived)
    graph.module.graph.eliminate_dead_code()
    graph.remove_tensor(f"{name}.lut")
    return f"{name}.theta"


def plain_levels(graph: Graph, site: Site) -> Theta | None:
    """Store the levels of a weight that follow from ``theta``, which is dropped and returned; None if none do."""
    name, derived = weight_name(site), arguments(site).get("lut")
    if not isinstance(derived, fx.Node) or derived.op == "get_attr":
        return None
    (source,) = derived.all_input_nodes
    levels, info = evaluate_constant(graph, derived), graph.info(str(source.target))
    largest = derived.args[1]
    assert isinstance(largest, float), f"{name}: levels to a largest level that is computed"
    found = Theta(graph.tensor(str(source.target)).detach(), largest, levels)
    aliases = tuple(f"{alias.rpartition('.')[0]}.lut" for alias in info.aliases)
    stored = graph.add_tensor(f"{name}.lut", levels, before=site.node, info=replace(info, aliases=aliases))
    site.node.replace_input_with(derived, stored)
    graph.module.graph.eliminate_dead_code()
    graph.remove_tensor(str(source.target))
    return found


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and (not has_data(one) or torch.equal(one, other))


def in_order(indices: Tensor, lut: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """The same weight with strictly increasing fp16 levels: sorted, and the indices renumbered, where they are not so.

    indices: u8 [out, bytes]    lut: [n] or [groups, n]  ->  the same, the levels rounded to fp16 in the dtype of lut

    Levels that are in order once rounded leave the indices as they are. Of two that are the same one moves a step.
    """
    if not has_data(lut):
        return indices, lut
    rounded = lut.half().to(lut.dtype)
    if bool((rounded.diff(dim=-1) > 0).all()):
        return indices, rounded
    n, tables = lut.shape[-1], lut.reshape(-1, lut.shape[-1])
    placed = tables.sort(dim=-1)
    place = placed.indices.argsort(dim=-1)
    bits, rows = bits_for(n), indices.shape[0]
    codes = unpack_bits(indices, bits, columns)
    at = codes.int() + level_starts(lut, rows, slice(0, rows))
    codes = place.to(torch.uint8).reshape(-1).index_select(0, at.view(-1)).view(codes.shape)
    levels = torch.stack([fp16_levels(row.double().cpu().numpy(), n) for row in placed.values])
    return pack_bits(codes, bits), levels.to(lut.device, lut.dtype).view(lut.shape)
