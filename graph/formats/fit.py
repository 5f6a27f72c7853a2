"""The alternation behind ``fit_scales``: indices, scales of the rows, levels, columns of low-rank scales, and again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from graph.formats.fitting import assign, level_sums, products
from graph.formats.levels import fit_levels, fp16_levels
from graph.formats.row_scales import LowRankScales, RowScales
from graph.formats.scales import apart_from_zero

CHUNK = 1 << 17
"""Weights worked on at a time: their several fp32 copies stay in the cache."""

LEAST = 64
"""Columns worked on at a time, at least: fewer of a row are read as slowly as this many."""

SAMPLE = 1 << 18
"""Weights that the first levels are fitted to."""

REFIT_SAMPLE = 1 << 16
"""Weights that there are for a level when levels are refitted: more would move it by some thousandths of a step."""

ENOUGH = 2e-3
"""A round that lowers the squared error by less than this share is the last."""


def row_slices(rows: int, columns: int, start: int = 0, least: int = 1) -> list[slice]:
    """Slices of ``rows`` rows from row ``start`` on, each of about ``CHUNK`` weights and ``least`` rows or more."""
    step = max(least, CHUNK // columns)
    return [slice(first, min(first + step, start + rows)) for first in range(start, start + rows, step)]


class Fit:
    """What changes while a weight w [out, in] is fitted: ``levels`` [luts, n], ``scales`` and ``indices``."""

    def __init__(
        self, w: Tensor, moments: Tensor | None, scales: RowScales, levels: Tensor, symmetric: bool, zero_free: bool
    ) -> None:
        self.w, self.scales, self.levels = w.detach(), scales, levels
        self.symmetric, self.zero_free = symmetric, zero_free
        self.moments = None if moments is None else positive(moments.detach().float())
        self.indices = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
        self._errors: list[float] = []

    def run(self, rounds: int, better: RowScales | None = None) -> tuple[float, ...]:
        """Alternate until nothing more is gained. ``better`` are scales that may be nearer than those at the start.

        Returns the relative errors, from that of the start to that of the end; they never rise.
        """
        energy = sum(self._total(self._rows(part).square()) for _, part in self._parts())
        self._errors = [self._assign()]
        self._attempt(lambda: self._first_levels(better))
        for _ in range(rounds):
            before = self._errors[-1]
            if not self._attempt(self._round) or self._errors[-1] > (1 - ENOUGH) * before:
                break
        return tuple(math.sqrt(error / energy) if energy else 0.0 for error in self._errors)

    def _attempt(self, change: Callable[[], None]) -> bool:
        """Make a change and pick the indices anew; where rounding made things worse, take it back."""
        held = self.scales.copy(), self.levels
        change()
        error = self._assign()
        if error <= self._errors[-1]:
            self._errors.append(error)
            return True
        self.scales, self.levels = held
        self._assign()
        return False

    def _parts(self) -> Iterator[tuple[int, slice]]:
        """The number of a LUT and a slice of the rows that use it, for all rows."""
        rows, columns = self.w.shape
        share = rows // self.levels.shape[0]
        for lut in range(self.levels.shape[0]):
            for part in row_slices(share, columns, lut * share):
                yield lut, part

    def _rows(self, part: slice) -> Tensor:
        return self.w[part].float()

    def _total(self, squares: Tensor) -> float:
        return float((squares if self.moments is None else squares * self.moments).sum(dtype=torch.float64))

    def _assign(self) -> float:
        """Pick the nearest level of every weight; the squared error that is left."""
        error = 0.0
        for lut, part in self._parts():
            levels, s = self.levels[lut], self.scales.of(part)
            error += assign(self._rows(part), s, levels, self.moments, self.indices[part])
        return error

    def _first_levels(self, better: RowScales | None) -> None:
        """Take the better scales, and the best levels for the scales that there are, from some rows of each LUT."""
        self.scales = better or self.scales
        rows, columns = self.w.shape
        share = rows // self.levels.shape[0]
        step = max(1, share * columns // SAMPLE)
        found = []
        for start in range(0, rows, share):
            some = slice(start, start + share, step)
            s = apart_from_zero(self.scales.of(some))
            weight = s.square() if self.moments is None else s.square() * self.moments
            found.append(fit_levels(self._rows(some) / s, self.levels.shape[1], weight, **self._kind()))
        self.levels = torch.stack(found)

    def _kind(self) -> dict[str, bool]:
        return {"symmetric": self.symmetric, "zero_free": self.zero_free}

    def _round(self) -> None:
        """Solve for the scales of each row, for the levels, and for the columns of low-rank scales."""
        luts, n = self.levels.shape
        below, above = torch.zeros(2, luts, n, dtype=torch.float64, device=self.w.device)
        share, at_once = self.w.shape[0] // luts, max(1, CHUNK // self.w.shape[1])
        every = max(1, share * self.w.shape[1] // (n * REFIT_SAMPLE))
        for lut, part in self._parts():
            w, at = self._rows(part), self.indices[part]
            self.scales.solve_rows(part, *products(w, at, self.levels[lut], self.moments))
            if part.start % share // at_once % every == 0:
                level_sums(w, self.scales.of(part), at, self.moments, below[lut], above[lut])
        self._refit_levels(below, above)
        if isinstance(self.scales, LowRankScales):
            self._solve_columns(self.scales)

    def _solve_columns(self, scales: LowRankScales) -> None:
        rows, columns = self.w.shape
        scales.begin_columns()
        share = rows // self.levels.shape[0]
        for part in row_slices(columns, rows, least=LEAST):
            w, at = self.w[:, part].float().split(share), self.indices[:, part].split(share)
            found = [products(*of_lut) for of_lut in zip(w, at, self.levels, strict=True)]
            squares, multiplied = (torch.cat(one) if len(one) > 1 else one[0] for one in zip(*found, strict=True))
            scales.solve_columns(part, squares, multiplied)
        self.scales = scales.orthonormal()

    def _refit_levels(self, below: Tensor, above: Tensor) -> None:
        """Each level becomes ``sum m S W / sum m S^2`` of its weights, and the largest becomes 1.

        below, above: f64 [luts, n], the two sums
        """
        luts, n = self.levels.shape
        share = self.w.shape[0] // luts
        if self.symmetric:
            below, above = below + below.flip(1), above - above.flip(1)
        found = torch.where(below > 0, above / below, self.levels.double()).sort(dim=1).values
        largest = found.abs().amax(1)
        largest = torch.where(largest > 0, largest, 1.0)
        centres = (found / largest[:, None]).cpu().numpy()[:, n // 2 if self.symmetric else 0 :]
        self.levels = torch.stack([fp16_levels(row, n, **self._kind()) for row in centres]).to(self.w.device)
        for lut, factor in enumerate(largest.tolist()):
            self.scales.times(slice(lut * share, (lut + 1) * share), factor)


def positive(moments: Tensor) -> Tensor:
    """Of mean 1, and none so small that the columns of an input that was always 0 have no scale."""
    moments = moments / moments.mean().clamp(min=torch.finfo(torch.float32).tiny)
    return moments.clamp(min=1e-4)
