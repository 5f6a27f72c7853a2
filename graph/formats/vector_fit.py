"""Fitting a table of vectors and the scales of rows to a weight: k-means in V dimensions, and least squares.

What is minimised is ``sum m_j (w_ij - s_i c_v)^2``, c the vector of the index and m the inputs' mean squares. Some rows
of the weight find the table: seeds drawn by greedy k-means++ (D. Arthur, S. Vassilvitskii, SODA 2007), then indices,
scales and table in turn (Lloyd), a few times. All rows go on from the best of these for a few rounds, none of which
makes it worse. The draws come from a seed of their own, so the same weight has the same table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from graph.formats.fit import REFIT_SAMPLE, positive, row_slices
from graph.formats.format import has_data
from graph.formats.scales import SMALLEST_ABSMAX
from graph.formats.vector_weight import nearest_vectors, spread

SAMPLE = 1 << 16
"""Vectors of the rows that find the table, about."""

SEEDING = 1 << 14
"""Of these, as many as seeds are drawn from, and tried on."""

TRIES = 5
"""Draws of seeds, of which the best is gone on with: where k-means comes to rest depends on them."""

CANDIDATES = 6
"""Draws from which each seed is the best."""

ROUNDS_OF_TRY, ROUNDS_OF_SAMPLE, ROUNDS = 12, 40, 6
"""Rounds at most: of each try, of the best one on the sample, and on all rows."""

ENOUGH = 1e-3
"""A round that lowers the squared error by less than this share is the last."""

LEAST = 2.0**-14
"""What a value of a table that shall hold no zero is moved away to; the smallest normal fp16 number."""


@dataclass(frozen=True)
class FittedVectors:
    """A weight [out, in] on a table."""

    table: Tensor
    """f32 [n, V], all fp16 numbers; where there are scales, the largest magnitude is 1."""

    scale: Tensor | None
    """f32 [out, 1]."""

    codes: Tensor
    """u8 [out / V, in], the nearest of the table."""

    errors: tuple[float, ...] = ()
    """Relative errors of all rows, from the first to the last round; they never rise."""


def fit_vectors(
    w: Tensor,
    entries: int,
    width: int,
    *,
    scaled: bool = True,
    moments: Tensor | None = None,
    zero_free: bool = True,
    start: tuple[Tensor, Tensor | None] | None = None,
) -> FittedVectors:
    """The table of ``entries`` vectors of ``width`` values each, and the scales, of least squared error.

    w: [out, in], float    moments: [in], the inputs' mean squares, or None: all alike

    ``start`` is a table and scales to go on from, in the place of those that some rows find.
    """
    rows, columns = w.shape
    assert rows % width == 0, f"{rows} rows in vectors of {width}"
    if not has_data(w):
        scale = w.new_empty(rows, 1, dtype=torch.float32) if scaled else None
        codes = w.new_empty(rows // width, columns, dtype=torch.uint8)
        return FittedVectors(w.new_empty(entries, width, dtype=torch.float32), scale, codes)
    m = None if moments is None else positive(moments.detach().float())
    if start is not None:
        return _Fit(w.detach(), m, *start, zero_free).run(ROUNDS)
    size = _size(w, m) if scaled else None
    few, some = (_some_rows(rows, columns, width, count, w.device) for count in (SEEDING, SAMPLE))
    generator = torch.Generator().manual_seed(0)
    part, own = w.detach()[few].float(), None if size is None else size[few]
    seeds = (_seeds(part, own, m, entries, width, generator) for _ in range(TRIES))
    tries = [_Fit(part, m, table, own, zero_free).run(ROUNDS_OF_TRY) for table in seeds]
    found = min(tries, key=lambda one: one.errors[-1])
    for here, before, most in ((some, few, ROUNDS_OF_SAMPLE), (slice(None), some, ROUNDS)):
        if size is not None and found.scale is not None:
            own = size[here] * (found.scale / size[before]).median()
        found = _Fit(w.detach()[here], m, found.table, own, zero_free).run(most)
    return found


def _size(w: Tensor, m: Tensor | None) -> Tensor:
    """The root mean square of each row, f32 [out, 1]."""
    found = torch.empty(w.shape[0], 1, device=w.device)
    for part in row_slices(*w.shape):
        squares = w[part].detach().float().square()
        found[part] = (squares if m is None else squares * m).mean(1, keepdim=True).sqrt_()
    return found.clamp_(min=SMALLEST_ABSMAX)


def _some_rows(rows: int, columns: int, width: int, vectors: int, device: torch.device) -> Tensor:
    """The rows of about so many vectors, spread over the weight by chance, in order, i64."""
    groups = rows // width
    chosen = torch.randperm(groups, generator=torch.Generator().manual_seed(0))[: max(1, vectors // columns)]
    chosen = chosen.sort().values
    return (chosen[:, None] * width + torch.arange(width)).flatten().to(device)


def _seeds(
    w: Tensor, s: Tensor | None, m: Tensor | None, entries: int, width: int, generator: torch.Generator
) -> Tensor:
    """Vectors of the weight that lie apart: each is drawn by how far it is from those before it.

    w: f32 [rows, in]  ->  f32 [entries, width]
    """
    columns = w.shape[1]
    x = w.view(-1, width, columns).transpose(1, 2).reshape(-1, width)
    scale = torch.ones_like(x) if s is None else s.view(-1, 1, width).expand(-1, columns, -1).reshape(-1, width)
    weight = torch.ones(columns, device=w.device) if m is None else m
    drawn = torch.randperm(len(x), generator=generator)[:SEEDING].to(w.device)
    x, scale, weight = x[drawn], scale[drawn], weight[drawn % columns].double()
    squares = x.square().sum(1, keepdim=True)
    left, found = torch.full_like(weight, torch.inf), list[Tensor]()
    for _ in range(entries):
        reach = (left if found and float(left.sum()) > 0 else weight).cumsum(0)  # by then each may be there already
        at = torch.rand(CANDIDATES, generator=generator, dtype=torch.float64).to(w.device) * reach[-1]
        picked = torch.searchsorted(reach, at).clamp_(max=len(x) - 1)
        offered = x[picked] / scale[picked]
        apart = squares + (scale.square() @ offered.square().t() - 2 * (x * scale) @ offered.t())
        distances = (apart.double().clamp_(min=0) * weight[:, None]).minimum(left[:, None])
        best = int(distances.sum(0).argmin())
        found.append(offered[best])
        left = distances[:, best]
    return torch.stack(found)


class _Fit:
    """What changes while a weight w [out, in] is fitted: ``table`` [n, V], ``scale`` [out, 1] and ``codes``."""

    def __init__(self, w: Tensor, m: Tensor | None, table: Tensor, scale: Tensor | None, zero_free: bool) -> None:
        self.w, self.m, self.zero_free = w, m, zero_free
        self.entries, self.width = table.shape
        self.table, factor = self._rounded(table.detach().double(), scale is not None)
        self.scale = None if scale is None else scale.detach().float() * factor

    def run(self, rounds: int) -> FittedVectors:
        """Alternate until nothing more is gained."""
        energy, errors = 0.0, list[float]()
        best = FittedVectors(self.table, self.scale, torch.empty(0))
        for last in (*[False] * rounds, True):
            held = self.table, self.scale
            codes, energy, error = self._round(last)
            if errors and error > errors[-1]:
                break
            errors.append(error)
            best = FittedVectors(*held, codes)
            if len(errors) > 1 and error > (1 - ENOUGH) * errors[-2]:
                break
        shares = tuple(math.sqrt(error / energy) if energy else 0.0 for error in errors)
        return FittedVectors(best.table, best.scale, best.codes, shares)

    def _parts(self) -> Iterator[slice]:
        groups, columns = self.w.shape[0] // self.width, self.w.shape[1]
        parts = row_slices(groups, columns * self.width)
        return (slice(part.start * self.width, part.stop * self.width) for part in parts)

    def _round(self, last: bool) -> tuple[Tensor, float, float]:
        """The nearest indices, the energy of the weight and the error they leave; then better scales and table.

        The last round finds indices alone.
        """
        rows, columns = self.w.shape
        codes = torch.empty(rows // self.width, columns, dtype=torch.uint8, device=self.w.device)
        below, above = torch.zeros(2, self.entries, self.width, dtype=torch.float64, device=self.w.device)
        scale = None if self.scale is None else self.scale.clone()
        every = max(1, rows * columns // (self.entries * self.width * REFIT_SAMPLE))
        energy = error = 0.0
        for number, part in enumerate(self._parts()):
            w, s = self.w[part].float(), None if self.scale is None else self.scale[part]
            at = slice(part.start // self.width, part.stop // self.width)
            codes[at] = nearest_vectors(w, s, self.table)
            q = spread(codes[at], self.table, torch.empty_like(w))
            there, off = self._sums(w, q, s, None if scale is None else scale[part])
            energy, error = energy + there, error + off
            if not last and number % every == 0:
                self._add(w, None if scale is None else scale[part], codes[at], below, above)
        if not last:
            self._better(below, above, scale)
        return codes, energy, error

    def _sums(self, w: Tensor, q: Tensor, s: Tensor | None, better: Tensor | None) -> tuple[float, float]:
        """The energy of some rows and the error that is left; their best scales are written to ``better``."""
        weighted = w if self.m is None else w * self.m
        total = (weighted * w).sum(1, dtype=torch.float64)
        product = (weighted * q).sum(1, dtype=torch.float64)
        square = (q.square() if self.m is None else q.square() * self.m).sum(1, dtype=torch.float64)
        by = 1.0 if s is None else s[:, 0].double()
        if better is not None:
            found = product / square
            better[:, 0] = torch.where(found > 0, found, better[:, 0].double()).float()  # where all is zero it is none
        return float(total.sum()), float((total - 2 * by * product + by * by * square).sum())

    def _add(self, w: Tensor, s: Tensor | None, codes: Tensor, below: Tensor, above: Tensor) -> None:
        """Add ``m s s`` and ``m s w`` of every weight to the sums of its place in the table."""
        columns, at = w.shape[1], codes.view(-1).int()
        scale = torch.ones(len(codes), self.width, device=w.device) if s is None else s.view(-1, self.width)
        for v in range(self.width):
            own = scale[:, v : v + 1].expand(-1, columns)
            weighted = own if self.m is None else own * self.m
            below[:, v] += torch.bincount(at, (weighted * own).reshape(-1).double(), minlength=self.entries)
            pulled = weighted * w.view(-1, self.width, columns)[:, v]
            above[:, v] += torch.bincount(at, pulled.reshape(-1).double(), minlength=self.entries)

    def _better(self, below: Tensor, above: Tensor, scale: Tensor | None) -> None:
        """Each value of the table becomes ``sum m s w / sum m s s``; an entry that no vector is nearest to stays."""
        found = torch.where(below > 0, above / below, self.table.double())
        self.table, factor = self._rounded(found, scale is not None)
        self.scale = None if scale is None else scale * factor

    def _rounded(self, table: Tensor, scaled: bool) -> tuple[Tensor, float]:
        """The table in fp16 numbers, and what it has been divided by."""
        largest = float(table.abs().max())
        factor = largest if scaled and largest > 0 else 1.0
        held = (table / factor).clamp(-65504, 65504).half().float()
        if self.zero_free:
            held = torch.where(held.abs() < LEAST, torch.full_like(held, LEAST).copysign(held), held)
        return held, factor
