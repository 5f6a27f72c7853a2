"""Ternary weights of a graph, as a file of them is counted and described: what is packed, what is kept, how large.

With P values, a share f of them ternary at b bits and n scales of 2 bytes, everything else in k bytes, which are 2 too:

    bytes = P f b / 8 + k P (1 - f) + 2 n
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

from graph.core import Graph
from graph.dense import Dense, checkpoint_tensors
from graph.errors import QcError
from graph.formats.stored import format_of, packed_sites, packed_tensors, weight_name
from graph.formats.ternary_format import Ternary
from graph.formats.trits import PER_BYTE
from graph.sites import Site


@dataclass(frozen=True)
class Packed:
    """A ternary weight of a graph."""

    name: str
    form: Ternary
    site: Site
    transposed: bool
    """The checkpoint has it the other way round."""

    def sides(self, graph: Graph) -> dict[str, Tensor]:
        """Its integers and scales."""
        return packed_tensors(graph, self.site)


def split(graph: Graph) -> tuple[list[Packed], list[Dense], list[QcError]]:
    """The packed ternary weights of a graph, the tensors of its checkpoint beside them, and what is in the way."""
    tensors, errors = checkpoint_tensors(graph)
    found: list[Packed] = []
    others: list[Site] = []
    for site in packed_sites(graph):
        form, name = format_of(site), weight_name(site)
        if not isinstance(form, Ternary):
            others.append(site)
        elif form.latent:
            what = f"{name} is latent: no integers of it are stored"
            errors.append(QcError(what, site=site.name, fix="run freeze-ternary before the export"))
        else:
            found.append(Packed(name, form, site, graph.info(f"{name}.indices").transposed))
    if others:
        errors.append(_not_ternary(others))
    if not found and not errors:
        errors.append(QcError("the graph has no ternary weights", fix="add ternary-ste and freeze-ternary"))
    known = {one.name for one in found}
    return found, [tensor for tensor in tensors if tensor.name not in known], errors


def _not_ternary(sites: list[Site]) -> QcError:
    more = f", and so do {len(sites) - 1} more" if len(sites) > 1 else ""
    what = f"{weight_name(sites[0])} holds {format_of(sites[0]).name}{more}, and ternary weights are wanted"
    fix = "export to safetensors, or add dequantize, ternary-ste and freeze-ternary, which rounds once more"
    return QcError(what, site=sites[0].name, fix=fix)


@dataclass(frozen=True)
class Account:
    """How many values there are, how many of them are ternary, and how large a file of them is."""

    values: int
    ternary: int
    scale_bytes: int
    bits: float
    """Of a ternary value: 2, or 1.6 where five share a byte."""

    kept_bytes: int = 2
    """Of a value that is not ternary."""

    @property
    def formula_bytes(self) -> float:
        """What the file should come to."""
        return self.ternary * self.bits / 8 + self.kept_bytes * (self.values - self.ternary) + self.scale_bytes

    def figures(self, file_bytes: int) -> dict[str, Any]:
        """The figures of a file of that size; ratios are of what lies on the disk."""
        return {
            "values": self.values,
            "ternary_share": round(self.ternary / self.values, 6),
            "bytes": file_bytes,
            "formula_bytes": round(self.formula_bytes),
            "formula_error": round(file_bytes / self.formula_bytes - 1, 6),
            "bits_per_weight": round(8 * file_bytes / self.values, 4),
            "ratio_vs_fp32": round(4 * self.values / file_bytes, 4),
            "ratio_vs_fp16": round(2 * self.values / file_bytes, 4),
        }

    def arithmetic(self, wanted: float = 7.0) -> str:
        """Whether the file can be ``wanted`` times smaller than fp32, with the figures that decide it."""
        kept, full = self.values - self.ternary, 4 * self.values
        ratio = full / self.formula_bytes
        values = f"{self.ternary:,} of {self.values:,} values at {self.bits:g} bits, {kept:,} in {8 * self.kept_bytes}"
        size = f"{self.formula_bytes:,.0f} bytes: {ratio:.2f} times less than the {full:,} of fp32"
        said = f"{values} and {self.scale_bytes:,} bytes of scales are {size}"
        if ratio >= wanted:
            return said
        each = (self.ternary * self.bits / 8 + self.scale_bytes) / self.ternary
        share = (4 / wanted - each) / (self.kept_bytes - each)
        if share < 0:
            return f"{said}. Its scales alone are too many for {wanted:g}"
        here = kept / self.values
        return f"{said}. For {wanted:g} at most {share:.1%} of the values could be kept; here it is {here:.1%}"


def account(graph: Graph, packed: list[Packed], kept: list[Dense], kept_bytes: int = 2) -> Account:
    """The account of a graph that was split; what is kept takes so many bytes each."""
    ternary = sum(prod(one.site.value.shape) for one in packed)
    scales = [f"{one.name}.scale" for one in packed]
    scale_bytes = sum(prod(graph.shape(name)) * graph.dtype_of(name).itemsize for name in scales)
    bits = sum(8 / PER_BYTE[one.form.packing] * prod(one.site.value.shape) for one in packed) / ternary
    return Account(ternary + sum(prod(one.shape) for one in kept), ternary, scale_bytes, bits, kept_bytes)


def described(one: Packed, sides: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a record says of one ternary weight."""
    rows = int(sides["indices"].shape[0])
    values = rows * one.form.columns
    return {
        "shape": [rows, one.form.columns],
        "transposed": one.transposed,
        "packing": one.form.packing,
        "scales": list(sides["scale"].shape),
        "zero_share": round(one.form.zeros(sides) / values, 6),
    }
