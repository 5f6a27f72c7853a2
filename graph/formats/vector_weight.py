"""The arithmetic of a weight of vectors: ``W = Q * S``, where each index stands for values of several rows at once.

A table [n, V] holds n vectors; index [i, j] stands for the weights of the rows ``V i`` to ``V i + V - 1`` in column j.
There is one scale a row, or none.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from graph.formats import native
from graph.formats.bits import Reader
from graph.formats.format import has_data
from graph.formats.lut_scales import Factors, row_parts
from graph.formats.lut_weight import LatentWeight, LutWeight
from graph.formats.scales import apart_from_zero

AT_ONCE = 1 << 17
"""Weights whose vectors are looked for at a time, so that they stay in the cache from one entry to the next."""

WIDEST = 16
"""Values of a vector that ``fitting.c`` has room for."""


def nearest_vectors(w: Tensor, s: Tensor | None, table: Tensor) -> Tensor:
    """The entry of least squared error for every V rows of a column, of equally near ones the first.

    w: f32 [rows, in]    s: f32 [rows, 1] or None: 1    table: f32 [n, V]  ->  u8 [rows / V, in]

    What counts is the error of the weight, ``sum_v (w_v - s_v c_v)^2``: of two rows the one with the larger scale has
    more to say. It is ``sum s^2 c^2 - 2 sum s w c`` and a number that is the same for all entries.
    """
    entries, width = table.shape
    groups, columns = w.shape[0] // width, w.shape[1]
    found = torch.empty(groups, columns, dtype=torch.uint8, device=w.device)
    if not (has_data(w) and has_data(table)):
        return found
    scale = None if s is None else s.reshape(groups, width).contiguous()
    ones = torch.ones(groups, width, device=w.device)
    own, turned = (ones if scale is None else scale.square()) @ table.square().t(), -2 * table
    w, given = w.contiguous(), () if scale is None else (scale,)
    in_c = native.function("vector_nearest", w, own, turned, found, *given) if width <= WIDEST else None
    if in_c is not None:
        in_c(*map(native.at, (w, scale, own, turned)), groups, width, columns, entries, native.at(found))
        return found
    for part in row_parts(groups, columns * width, AT_ONCE):
        x = w[width * part.start : width * part.stop].view(-1, width, columns)
        found[part] = _nearest(x if scale is None else x * scale[part, :, None], turned, own[part, :, None])
    return found


def _nearest(x: Tensor, turned: Tensor, own: Tensor) -> Tensor:
    """The entries of the smallest ``own + sum turned x``, one by one: torch has no quick search along an axis.

    x: f32 [groups, V, in]    turned: f32 [n, V]    own: f32 [groups, n, 1]  ->  u8 [groups, in]
    """
    least = torch.full((x.shape[0], x.shape[2]), torch.inf, device=x.device)
    found = torch.zeros(least.shape, dtype=torch.uint8, device=x.device)
    for k in range(turned.shape[0]):
        distance = x[:, 0] * turned[k, 0]
        for v in range(1, turned.shape[1]):
            distance += x[:, v] * turned[k, v]
        distance += own[:, k]
        found.masked_fill_(distance < least, k)
        torch.minimum(least, distance, out=least)
    return found


def spread(codes: Tensor, table: Tensor, out: Tensor) -> Tensor:
    """The values that indices stand for, written to ``out``.

    codes: u8 [rows / V, in]    table: f32 [n, V]    out: f32 [rows, in]
    """
    at, rows = codes.int().view(-1), out.view(codes.shape[0], table.shape[1], codes.shape[1])
    for v, column in enumerate(table.t()):
        rows[:, v] = column.contiguous().index_select(0, at).view(codes.shape)
    return out


class VectorWeight(LutWeight):
    """A weight [out, in] of vectors of the table ``lut`` [n, V]; ``codes`` gives an index for each, [out / V, in]."""

    @property
    def width(self) -> int:
        """V, the rows that a vector lies in."""
        return int(self.lut.shape[1])

    @cached_property
    def table(self) -> Tensor:
        """The vectors, f32 [n, V]."""
        return self.lut.detach().float()

    def parts(self) -> Iterator[slice]:
        """Slices of all rows that part no vector; none of a plan."""
        parts = row_parts(self.shape[0] // self.width, self.shape[1] * self.width)
        scaled = (slice(self.width * part.start, self.width * part.stop) for part in parts)
        return scaled if has_data(self.lut) else iter(())

    def _of_vectors(self, rows: slice) -> slice:
        """The vectors that lie in these rows."""
        return slice(rows.start // self.width, rows.stop // self.width)

    def places(self, rows: slice, s: Tensor | None) -> Tensor:
        """Where in all values of the table behind one another each of Q lies, i32 [rows, in]."""
        first = self.codes(rows, s).int() * self.width
        within = torch.arange(self.width, dtype=torch.int32, device=first.device)
        return (first[:, None, :] + within[:, None]).flatten(0, 1)


class PackedVectors(VectorWeight):
    """The weight that packed indices, u8 [out / V, bytes], stand for."""

    def __init__(self, indices: Tensor, lut: Tensor, columns: int, factors: Factors, floor: float | None = None):
        super().__init__(indices.shape[0] * lut.shape[1], columns, lut, factors, floor)
        self.readers = [Reader(indices, column.contiguous(), columns) for column in self.table.t()]

    def levels(self, rows: slice, s: Tensor | None, out: Tensor) -> Tensor:
        part = self._of_vectors(rows)
        apart = out.view(-1, self.width, self.shape[1])
        one = torch.empty(apart.shape[0], apart.shape[2], device=out.device)
        for v, read in enumerate(self.readers):
            apart[:, v] = read(part, one)
        return out

    def codes(self, rows: slice, s: Tensor | None) -> Tensor:
        return self.readers[0].codes(self._of_vectors(rows))


class LatentVectors(VectorWeight, LatentWeight):
    """The nearest vectors of a float weight [out, in]."""

    def codes(self, rows: slice, s: Tensor | None) -> Tensor:
        scale = self.factors[0][rows] if self.factors else None
        return nearest_vectors(self.latent.detach()[rows].float(), scale, self.table)

    def levels(self, rows: slice, s: Tensor | None, out: Tensor) -> Tensor:
        return spread(self.codes(rows, s), self.table, out)

    def all_codes(self) -> Tensor:
        """The indices of all rows, u8 [out / V, in]."""
        found = torch.empty(self.shape[0] // self.width, self.shape[1], dtype=torch.uint8, device=self.lut.device)
        for part in self.parts():
            found[self._of_vectors(part)] = self.codes(part, None)
        return found

    def slope(self, rows: slice, q: Tensor, s: Tensor) -> Tensor:
        """Q; where the latent weight trains as well, ``Q - w / S`` within the reach of the table in that row."""
        if not self.both:
            return q
        normed = self.latent[rows].float() / apart_from_zero(s)
        low, high = (end.repeat(len(q) // self.width)[:, None] for end in (self.table.amin(0), self.table.amax(0)))
        return torch.where((normed >= low) & (normed <= high), q - normed, q)
