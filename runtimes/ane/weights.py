"""What a linear or an embedding multiplies with, in the form in which a package holds it: never unpacked.

    fp16       W                     2 bytes a weight
    int8       Q * s                 one scale a row, part of the weight
    lut        lut[index]            and perhaps a scale a row, multiplied with what comes out; an index may stand for
                                     the weights of several rows
    low-rank   lut[index] * (A B)    ranks are multiplied with what goes in and what comes out

Ternary weights are a LUT of -1, 0 and 1 in 2 bits, with their scales by row, or as many ranks as a row has groups.

Kind and size follow from shapes; values are read when they are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx

from graph import Graph, QcError
from graph.formats.bits import bits_for, unpack_bits
from graph.formats.format import unpack
from graph.formats.lut_scales import scale_factors
from graph.formats.stored import arguments, format_of, packed_tensors, weight_name
from graph.formats.ternary import levels as trits_as_levels
from graph.formats.ternary import two_bits
from graph.ops import op_name
from graph.probe import evaluate_constant
from graph.sites import Site, node_name
from runtimes.ane.emitter import Array

Kind = Literal["fp16", "int8", "lut", "low-rank"]

LARGEST = 65504.0
FINEST_SCALE = 2.0**-14
"""The smallest normal fp16 number. Scales below it lose bits, or all of them where subnormals are flushed."""

_HARMLESS = frozenset({"aten.to.dtype", "qc.ste_fp16", "qc.cast_like", "aten.contiguous", "aten.clone"})
"""Ops on a weight that fp16 storage makes nothing of."""


@dataclass(frozen=True)
class Weight:
    """A stored weight [rows, columns]."""

    graph: Graph
    name: str
    kind: Kind
    rows: int
    columns: int
    node: fx.Node
    """What gives it to its reader's casts: the tensor, or the op that unpacks it."""

    bits: int = 16
    levels: int = 0
    tables: int = 1
    rank: int = 0
    row_scale: bool = False
    vector: int = 1
    """Rows whose weights an index stands for."""

    def bytes(self) -> int:
        """What its values come to in a package, padding and file headers apart."""
        if self.kind == "fp16":
            return 2 * self.rows * self.columns
        if self.kind == "int8":
            return self.rows * self.columns + 2 * self.rows
        indices = self.rows // self.vector * self.columns
        held = -(-indices * self.bits // 8) + 2 * self.tables * self.vector * (1 << self.bits)
        return held + 2 * self.rank * (self.rows + self.columns) + (2 * self.rows if self.row_scale else 0)

    def dense(self) -> Array:
        """Its values, fp16 [rows, columns]."""
        if self.node.op == "get_attr":
            value = self.graph.tensor(str(self.node.target)).detach()
        else:
            site = Site(self.graph, self.node)
            value = unpack(format_of(site), packed_tensors(self.graph, site), torch.float32)
        return fp16(value, self.name)

    def integers(self) -> tuple[Array, Array, float]:
        """Of int8: i8 [rows, columns], fp16 scales [rows], and the power of two by which these are too large.

        It is 1 unless a scale is so small that fp16 would round it more coarsely than others.
        """
        sides = self._sides()
        scale = sides["scale"].double() / 127
        present = scale[scale > 0]
        smallest = float(present.min()) if present.numel() else 1.0
        lift = 2.0 ** max(0, math.ceil(math.log2(FINEST_SCALE / smallest)))
        return sides["indices"].numpy(), fp16(scale * lift, f"{self.name}.scale"), lift

    def table(self) -> tuple[Array, Array]:
        """Of a LUT: u8 indices [rows / vector, columns]; fp16 levels [tables, levels], or vectors [levels, vector]."""
        sides = self._sides()
        shape = (self.tables, self.levels) if self.vector == 1 else (self.levels, self.vector)
        levels = fp16(sides["lut"].reshape(shape), f"{self.name}.lut")
        return unpack_bits(sides["indices"], self.bits, self.columns).numpy(), levels

    def pieces(self, most: int) -> list[slice]:
        """All rows, at most so many at a time, without parting a vector."""
        step = most - most % self.vector
        return [slice(start, min(start + step, self.rows)) for start in range(0, self.rows, step)]

    def scale(self) -> Array:
        """Of a LUT with a scale a row: fp16 [rows]."""
        return fp16(self._sides()["scale"].reshape(-1), f"{self.name}.scale")

    def factors(self) -> tuple[Array, Array]:
        """Of low-rank scales: fp16 A [rows, rank] and B [rank, columns], rounded as ``linear_lut_factored`` does."""
        sides = self._sides()
        if "scale" in sides:
            groups = self.rank
            b = torch.eye(groups).repeat_interleave(self.columns // groups, dim=1)
            return fp16(sides["scale"], f"{self.name}.scale"), fp16(b, self.name)
        a, b = scale_factors(None, sides["scale_a"], sides["scale_b"], sides.get("scale_g"), None, fp16=True)
        return fp16(a, f"{self.name}.scale_a"), fp16(b, f"{self.name}.scale_b")

    def _sides(self) -> dict[str, Tensor]:
        site = Site(self.graph, self.node)
        sides = {suffix: value.detach() for suffix, value in packed_tensors(self.graph, site).items()}
        if site.op != "qc.dequantize_ternary":
            return sides
        packed, scale = sides["indices"], sides["scale"].float().expand(self.rows, -1)
        packing = str(arguments(site)["packing"])
        return {"indices": two_bits(packed, self.columns, packing), "lut": trits_as_levels(packed), "scale": scale}


def weight_of(graph: Graph, node: fx.Node, reader: str) -> Weight:
    """The weight that the op at the site ``reader`` reads from ``node``; a QcError where it cannot be stored."""
    while node.op == "call_function" and op_name(node.target) in _HARMLESS:
        node = node.all_input_nodes[0]
    if node.op == "get_attr":
        rows, columns = graph.shape(str(node.target))
        return Weight(graph, str(node.target), "fp16", rows, columns, node)
    op = op_name(node.target) if node.op == "call_function" else "an input"
    if op == "qc.dequantize_int8":
        rows, columns = node.meta["val"].shape
        return Weight(graph, weight_name(Site(graph, node)), "int8", rows, columns, node, bits=8)
    if op in ("qc.dequantize_lut", "qc.linear_lut_factored"):
        return _lut(graph, node, reader)
    if op == "qc.dequantize_vector_lut":
        return _vectors(graph, node)
    if op == "qc.dequantize_ternary":
        return _ternary(graph, node)
    raise _not_stored(graph, node, op, reader)


def _ternary(graph: Graph, node: fx.Node) -> Weight:
    site = Site(graph, node)
    rows, columns = site.value.shape
    groups = int(graph.shape(f"{weight_name(site)}.scale")[1])
    kind: Kind = "low-rank" if groups > 1 else "lut"
    rank = groups if groups > 1 else 0
    return Weight(
        graph, weight_name(site), kind, rows, columns, node, bits=2, levels=3, rank=rank, row_scale=groups == 1
    )


def _vectors(graph: Graph, node: fx.Node) -> Weight:
    site = Site(graph, node)
    rows, columns = site.value.shape
    levels, width = graph.shape(f"{weight_name(site)}.lut")
    scaled = arguments(site).get("scale") is not None
    return Weight(
        graph, weight_name(site), "lut", rows, columns, node,
        bits=bits_for(levels), levels=levels, row_scale=scaled, vector=width,
    )  # fmt: skip


def _lut(graph: Graph, node: fx.Node, reader: str) -> Weight:
    site = Site(graph, node)
    given: Mapping[str, Any] = {
        key: value.meta["val"] if isinstance(value, fx.Node) else value for key, value in arguments(site).items()
    }
    name, columns, lut, scale = weight_name(site), int(given["columns"]), given["lut"], given.get("scale")
    if given.get("floor") is not None:
        fix = "run convert-scales before the export, which gives it scales without a floor"
        raise QcError(f"{name} has scales with a floor, which cannot be factored", site=reader, fix=fix)
    levels = int(lut.shape[-1])
    groups = 0 if scale is None else int(scale.shape[1])
    rank = int(given["scale_a"].shape[1]) if "scale_a" in given else groups if groups > 1 else 0
    return Weight(
        graph,
        name,
        "low-rank" if rank else "lut",
        int(given["indices"].shape[0]),
        columns,
        node,
        bits=bits_for(levels),
        levels=levels,
        tables=int(lut.shape[0]) if lut.dim() == 2 else 1,
        rank=rank,
        row_scale=groups == 1,
    )


def _not_stored(graph: Graph, node: fx.Node, op: str, reader: str) -> QcError:
    if op in ("qc.dequantize_4bit", "qc.dequantize_scaled", "qc.dequantize_affine"):
        name = weight_name(Site(graph, node))
        kind = f"int{node.args[3]}" if op == "qc.dequantize_affine" else node.args[2]
        what = f"{name} is {kind} with a scale every few columns, which the Neural Engine cannot keep packed"
        fix = "dequantize it before the export, or quantize it with scheme: lut or int8"
        return QcError(what, site=reader, fix=fix)
    if op in ("qc.fake_quantize_lut", "qc.fake_quantize_vector_lut"):
        what = f"{weight_name(Site(graph, node))} is still a float weight that is packed anew each time it is read"
        return QcError(what, site=reader, fix="run freeze-q before the export")
    if op == "qc.fake_quantize_ternary":
        what = f"{weight_name(Site(graph, node))} is still a float weight that is made ternary each time it is read"
        return QcError(what, site=reader, fix="run freeze-ternary before the export")
    what = f"the weight of {reader} is computed in the graph ({op} at {node_name(node)}), not stored"
    return QcError(what, site=reader, fix="merge adapters (merge-lora) before the export, or dequantize the weight")


def fp16(value: Tensor, name: str) -> Array:
    """A tensor as a package stores it; a QcError where a number does not survive that."""
    low, high = (float(end) for end in value.aminmax()) if value.numel() else (0.0, 0.0)
    if not (low >= -LARGEST and high <= LARGEST):
        extreme = low if -low > high else high
        beyond = f"beyond the {LARGEST:g} of fp16" if np.isfinite(extreme) else "which is no number"
        fix = "run scale-residual before the export if it feeds the residual stream, or repair the model"
        raise QcError(f"{name} holds {extreme:g}, {beyond}", site=name, fix=fix)
    found: Array = value.to(torch.float16).contiguous().numpy()
    return found


def constant(graph: Graph, node: fx.Node) -> Array:
    """The value of a node that depends on stored tensors only, fp16."""
    return fp16(evaluate_constant(graph, node).detach(), node_name(node))
