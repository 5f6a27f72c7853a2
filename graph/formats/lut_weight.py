"""The arithmetic of a LUT weight ``W = Q * S``: the weight itself, and the gradients of its levels and scales.

Q [out, in] holds the level of every index. All is done a few rows at a time, which stay in the cache from one step to
the next; of Q and S no more than these rows is ever there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from graph.formats.bits import Reader
from graph.formats.fitting import nearest_of
from graph.formats.format import has_data
from graph.formats.lut_scales import Factors, dense_scale, row_parts, rows_of
from graph.formats.memory import scratch
from graph.formats.scales import apart_from_zero
from graph.formats.ste import without_autocast


class LutWeight(ABC):
    """A weight [out, in] that is levels times scales."""

    def __init__(self, rows: int, columns: int, lut: Tensor, factors: Factors, floor: float | None):
        self.shape, self.lut, self.factors, self.floor = (rows, columns), lut, factors, floor

    @abstractmethod
    def levels(self, rows: slice, s: Tensor | None, out: Tensor) -> Tensor:
        """Q of these rows, whose scales are ``s``, written to ``out``."""

    @abstractmethod
    def codes(self, rows: slice, s: Tensor | None) -> Tensor:
        """The indices of these rows, u8."""

    def places(self, rows: slice, s: Tensor | None) -> Tensor:
        """Where in all levels behind one another each of Q lies, i32 [rows, in]."""
        return self.codes(rows, s).int() + level_starts(self.lut, self.shape[0], rows)

    @cached_property
    def b_turned(self) -> Tensor:
        """B the other way round, so that many small products read it in order."""
        return self.factors[1].t().contiguous()

    def slope(self, rows: slice, q: Tensor, s: Tensor) -> Tensor:
        """What a change of S does to these rows."""
        return q

    def dense(self, out: Tensor | None = None) -> Tensor:
        """The weight itself, f32 [out, in], written to ``out`` if that is given."""
        dense = torch.empty(self.shape, dtype=torch.float32, device=self.lut.device) if out is None else out
        for part in self.parts():
            s = self.scales(part, dense[part])
            q = self.levels(part, s, dense[part] if s is None else self._room(part, "q"))
            if s is not None:
                s.mul_(q)
        return dense

    def _room(self, rows: slice, name: str) -> Tensor:
        """Space for a value of each weight of these rows."""
        return scratch(f"lut {name}", (rows.stop - rows.start, self.shape[1]), torch.float32, self.lut.device)

    def parts(self) -> Iterator[slice]:
        """Slices of all rows, as many at a time as stay in the cache; none of a plan."""
        return row_parts(*self.shape) if has_data(self.lut) else iter(())

    def scales(self, rows: slice, out: Tensor) -> Tensor | None:
        """S of these rows, written to ``out``; None where there are no scales."""
        return dense_scale(rows_of(self.factors, rows), self.shape[1], self.floor, out)

    def gradients(self, d_w: Tensor, needs: Sequence[bool], dense: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """The gradients of ``lut`` and of the factors, of those that are needed.

        d_w: f32 [out, in]    dense: [out, in], which is filled with the weight itself; it may be d_w

        Those of levels are summed in fp64.
        """
        d_lut = torch.zeros(self.lut.numel(), dtype=torch.float64, device=self.lut.device) if needs[0] else None
        d_factors = tuple(map(torch.zeros_like, self.factors)) if any(needs[1:]) else ()
        for part in self.parts():
            s = self.scales(part, self._room(part, "s"))
            q = self.levels(part, s, self._room(part, "q"))
            if d_lut is not None:
                d_q = d_w[part] if s is None else d_w[part] * s
                d_lut += torch.bincount(self.places(part, s).view(-1), d_q.reshape(-1), minlength=d_lut.numel())
            if d_factors and s is not None:
                room = d_w[part] if dense is d_w else self._room(part, "d_s")
                d_s = torch.mul(d_w[part], self.slope(part, q, s), out=room)
                self._add(d_factors, part, d_s, s)
            if dense is not None:
                dense[part].copy_(q) if s is None else torch.mul(q, s, out=dense[part])
        found = None if d_lut is None else d_lut.to(self.lut.dtype).view(self.lut.shape)
        return found, *(d_factors or (None for _ in self.factors))

    def _add(self, d_factors: Factors, rows: slice, d_s: Tensor, s: Tensor) -> None:
        """Add what reaches S in these rows to the gradients of its factors."""
        if len(self.factors) == 1:
            d_factors[0][rows] = d_s.view(d_s.shape[0], self.factors[0].shape[1], -1).sum(-1)
            return
        a, _ = self.factors
        if self.floor is not None:
            d_s.masked_fill_(s <= self.floor, 0.0)
        with without_autocast(a):
            torch.mm(d_s, self.b_turned, out=d_factors[0][rows])
            d_factors[1].addmm_(a[rows].t(), d_s)


def level_starts(lut: Tensor, rows: int, part: slice) -> Tensor:
    """Where the levels of some of so many rows begin in all levels behind one another, i32 [part, 1]."""
    if lut.dim() == 1:
        return torch.zeros((), dtype=torch.int32, device=lut.device)
    numbers = torch.arange(part.start, part.stop, dtype=torch.int32, device=lut.device)
    return (numbers // (rows // lut.shape[0]) * lut.shape[1])[:, None]


class PackedWeight(LutWeight):
    """The weight that packed indices stand for."""

    def __init__(self, indices: Tensor, lut: Tensor, columns: int, factors: Factors, floor: float | None):
        super().__init__(indices.shape[0], columns, lut, factors, floor)
        self.read = Reader(indices, lut, columns)

    def levels(self, rows: slice, s: Tensor | None, out: Tensor) -> Tensor:
        return self.read(rows, out)

    def codes(self, rows: slice, s: Tensor | None) -> Tensor:
        return self.read.codes(rows)


class LatentWeight(LutWeight):
    """The nearest levels of a float weight [out, in]: of every ``w / S``, the lower of two that are as near."""

    def __init__(self, latent: Tensor, lut: Tensor, factors: Factors, floor: float | None, *, both: bool = False):
        super().__init__(latent.shape[0], latent.shape[1], lut, factors, floor)
        self.latent, self.both = latent, both

    def codes(self, rows: slice, s: Tensor | None) -> Tensor:
        return self._nearest(rows, s, self._room(rows, "levels of codes"))

    def _nearest(self, rows: slice, s: Tensor | None, out: Tensor) -> Tensor:
        """The indices of these rows, u8, whose levels are written to ``out``."""
        w, lut = self.latent.detach()[rows].float(), self.lut.detach().float()
        if lut.dim() == 1:
            return nearest_of(w, s, lut, out)[0]
        share = self.shape[0] // lut.shape[0]
        borders = [rows.start, *range(rows.start // share * share + share, rows.stop, share), rows.stop]
        found = []
        for start, end in pairwise(borders):
            part = slice(start - rows.start, end - rows.start)
            found.append(nearest_of(w[part], None if s is None else s[part], lut[start // share], out[part])[0])
        return torch.cat(found)

    def all_codes(self) -> Tensor:
        """The indices of all rows, u8 [out, in]."""
        found = torch.empty(self.shape, dtype=torch.uint8, device=self.lut.device)
        for part in self.parts():
            found[part] = self.codes(part, self.scales(part, self._room(part, "s")))
        return found

    def levels(self, rows: slice, s: Tensor | None, out: Tensor) -> Tensor:
        self._nearest(rows, s, out)
        return out

    def slope(self, rows: slice, q: Tensor, s: Tensor) -> Tensor:
        """Q; where the latent weight trains as well, ``Q - w / S`` between the outermost levels."""
        if not self.both:
            return q
        normed = self.latent[rows].float() / apart_from_zero(s)
        ends = self.lut.float().reshape(-1, self.lut.shape[-1])[:, [0, -1]]
        low, high = ends.repeat_interleave(self.shape[0] // ends.shape[0], dim=0)[rows].split(1, dim=1)
        return torch.where((normed >= low) & (normed <= high), q - normed, q)
