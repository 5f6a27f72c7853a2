"""Which of -1, 0 and 1 a weight becomes, and what that is multiplied by.

Weights that share a scale are a row, a group of columns of a row, or the whole tensor. Of each, with the mean
magnitude ``m = max(mean |w|, 1e-8)``:

    dead-zone     q = 0 where |w| < tau * m, else the sign of w
    round-clip    q = clip(round(w / m), -1, 1), that is 0 where |w| <= m / 2   (arXiv:2402.17764)
    absmean       scale = m
    least-squares scale = sum(w q) / sum(q^2), of least squared error for these q; never worse than absmean

With moments ``E[x^2]`` of the inputs, least squares counts the error of a column as often as its moment. Means are
summed in fp64 and rounded once, so that a weight which is ternary already has exactly its own scale as that of least
squares, and ``scale * share of values that are not 0`` as its absmean.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from graph.formats import native
from graph.formats.format import has_data
from graph.formats.memory import scratch

Rule = Literal["dead-zone", "round-clip"]
Fit = Literal["absmean", "least-squares"]

SMALLEST = 1e-8
"""What a scale is at least: that of a row of zeros."""

AT_ONCE = 1 << 18
"""Weights that are worked on at a time: what is made of them stays in a processor's caches."""


@dataclass(frozen=True)
class TernaryRule:
    """How a float weight becomes a ternary one."""

    rule: Rule = "dead-zone"
    tau: float | None = 0.1
    """The threshold of the dead zone as a share of the mean magnitude; None with round-clip, which has none."""

    fit: Fit = "absmean"
    group: int | None = None
    """Columns that share a scale; all of them are a row. None: one scale for the whole tensor."""

    @staticmethod
    def named(rule: str, tau: float | None, fit: str, group: int | None) -> TernaryRule:
        """The rule that an op is given in a graph."""
        rules = [one for one in get_args(Rule) if one == rule]
        fits = [one for one in get_args(Fit) if one == fit]
        assert rules and fits and (tau is None) == (rule == "round-clip"), f"no ternary rule is {rule}, {tau}, {fit}"
        return TernaryRule(rules[0], tau, fits[0], group)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The shape of the scales of a weight of this shape."""
        return (1, 1) if self.group is None else (shape[0], shape[1] // self.group)

    def fitted(self, w: Tensor, moments: Tensor | None = None, out: Tensor | None = None) -> Grid:
        """Thresholds and scales of a weight; the weight that it becomes is written to ``out`` on the way.

        w: [out, in], float    moments: [in], or None    out: f32 [out, in], or None
        """
        shape = self.scale_shape(tuple(w.shape))
        grid = Grid(*(w.new_empty(shape, dtype=torch.float32) for _ in range(2)))
        if not has_data(w):
            return grid
        weight = None if moments is None else moments.to(w.device, torch.float64)
        if self.group is None:
            grid = self._of_all(w, weight)
            if out is not None:
                grid.dense(w, out)
            return grid
        if moments is None and native.ternary_fitted(
            w, self.tau, self.fit == "least-squares", grid.threshold, grid.scale, out
        ):
            return grid
        for part in _parts(w):
            here = self._of_rows(w[part], weight, None if out is None else out[part])
            grid.threshold[part], grid.scale[part] = here.threshold, here.scale
        return grid

    def _of_rows(self, w: Tensor, weight: Tensor | None, out: Tensor | None) -> Grid:
        """The grid of some rows that share no scale with others: a weight is read from memory once."""
        groups, columns = self.scale_shape(tuple(w.shape))[1], w.shape[1]
        magnitude = _magnitude(w)
        mean = (_row_sums(magnitude, groups) / (columns / groups)).float().clamp(min=SMALLEST)
        grid = Grid(self._threshold(mean), mean)
        if self.fit == "absmean" and out is None:
            return grid
        ones = grid._ones(magnitude, _room("ones", w))
        if self.fit == "least-squares":
            grid = replace(grid, scale=_quotient(*_least_squares(magnitude, ones, groups, weight), mean))
        if out is not None:
            torch.copysign(ones, w.float(), out=out)
            out.view(w.shape[0], groups, -1).mul_(grid.scale[:, :, None])
        return grid

    def _of_all(self, w: Tensor, weight: Tensor | None) -> Grid:
        """The one threshold and scale of a whole weight."""
        total = sum(_row_sums(_magnitude(w[part]), 1).sum() for part in _parts(w))
        mean = (torch.as_tensor(total, device=w.device) / w.numel()).float().clamp(min=SMALLEST).view(1, 1)
        grid = Grid(self._threshold(mean), mean)
        if self.fit == "absmean":
            return grid
        sums = torch.zeros(2, dtype=torch.float64, device=w.device)
        for part in _parts(w):
            magnitude = _magnitude(w[part])
            ones = grid._ones(magnitude, _room("ones", w[part]))
            sums += torch.stack([one.sum() for one in _least_squares(magnitude, ones, 1, weight)])
        return replace(grid, scale=_quotient(sums[0].view(1, 1), sums[1].view(1, 1), mean))

    def _threshold(self, mean: Tensor) -> Tensor:
        """What a magnitude has to reach to become 1; round-clip's half is 0 yet, as it rounds to the even number."""
        if self.tau is not None:
            return mean * self.tau
        return torch.nextafter(mean / 2, torch.full_like(mean, torch.inf))


@dataclass(frozen=True)
class Grid:
    """The ternary values of one weight.

    threshold: f32 [out, groups], or [1, 1]; |w| from there on is 1    scale: of the same shape
    """

    threshold: Tensor
    scale: Tensor

    def with_scale(self, scale: Tensor) -> Grid:
        """The same integers, times another scale."""
        assert scale.shape == self.threshold.shape, f"scales {list(scale.shape)}, not {list(self.threshold.shape)}"
        return replace(self, scale=scale.detach().float())

    def rows(self, part: slice) -> Grid:
        """Of these rows alone."""
        return self if self.scale.shape[0] == 1 else Grid(self.threshold[part], self.scale[part])

    def dense(self, w: Tensor, out: Tensor | None = None) -> Tensor:
        """The weight that w [out, in] becomes, f32, written to ``out`` if that is given."""
        dense = w.new_empty(w.shape, dtype=torch.float32) if out is None else out
        by_row = self.scale.shape[0] == w.shape[0]
        if by_row and has_data(w) and native.ternary_dense(w, self.threshold, self.scale, dense):
            return dense
        for part in _parts(w):
            here = self.rows(part)
            integers = here._integers(w[part], dense[part])
            integers.mul_(here.scale[:, :, None])
        return dense

    def codes(self, w: Tensor) -> Tensor:
        """``q + 1`` of each value, u8 [out, in]."""
        codes = w.new_empty(w.shape, dtype=torch.uint8)
        for part in _parts(w):
            codes[part] = self.rows(part)._integers(w[part]).add_(1).view(w[part].shape)
        return codes

    def scale_gradient(self, w: Tensor, grad: Tensor) -> Tensor:
        """``sum(grad * q)`` over the weights that share a scale, in its shape."""
        found = torch.zeros((w.shape[0], self.scale.shape[1]), dtype=torch.float32, device=w.device)
        for part in _parts(w):
            integers = self.rows(part)._integers(w[part]).view(w[part].shape)
            found[part] = _row_sums(integers.mul_(grad[part]), found.shape[1])
        return found if self.scale.shape == found.shape else found.sum().view(1, 1)

    def _integers(self, w: Tensor, out: Tensor | None = None) -> Tensor:
        """-1, 0 or 1 of every value of these rows, f32 [rows, groups, columns], written to ``out`` if that is given."""
        values = w.float()
        ones = torch.abs(values) if out is None else torch.abs(values, out=out)
        self._ones(ones, ones)
        return torch.copysign(ones, values, out=ones).view(w.shape[0], self.scale.shape[1], -1)

    def _ones(self, magnitude: Tensor, out: Tensor) -> Tensor:
        """1 where a magnitude [rows, in] reaches its threshold, else 0, written to ``out``.

        As floats: a mask costs several times that.
        """
        shape = (*magnitude.shape[:1], self.scale.shape[1], -1)
        torch.ge(magnitude.view(shape), self.threshold[:, :, None], out=out.view(shape))
        return out


def _parts(w: Tensor) -> Iterator[slice]:
    """Slices of all rows, as many at a time as are worked on; none of a stand-in."""
    if not has_data(w):
        return iter(())
    rows, step = w.shape[0], max(1, AT_ONCE // max(1, w.shape[1]))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _magnitude(w: Tensor) -> Tensor:
    """``|w|``, f32, until the next is asked for."""
    return torch.abs(w.float(), out=_room("magnitude", w))


def _room(name: str, w: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory for what is made of some rows, which is kept: fresh pages cost more than the sums."""
    return scratch(f"ternary {name}", tuple(w.shape), dtype, w.device)


def _least_squares(magnitude: Tensor, ones: Tensor, groups: int, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """``sum(w q)`` and ``sum(q^2)`` by row and group, in fp64; ``magnitude`` is overwritten."""
    if weight is None:
        below = ones.view(ones.shape[0], groups, -1).sum(-1)  # of whole numbers: exact as it is
        kept = torch.mul(magnitude, ones, out=_room("double", ones, torch.float64))
        return _row_sums(kept, groups), below.double()
    counted = ones * weight
    below = _row_sums(counted, groups)
    return _row_sums(counted.mul_(magnitude), groups), below


def _quotient(above: Tensor, below: Tensor, mean: Tensor) -> Tensor:
    """The scale of least squared error; where nothing counts, the mean magnitude."""
    return torch.where(below > 0, above / below, mean.double()).float().clamp(min=SMALLEST)


def _row_sums(values: Tensor, groups: int) -> Tensor:
    """Sums of every row by group, in fp64: [rows, in]  ->  [rows, groups]."""
    double = values if values.dtype == torch.float64 else _room("double", values, torch.float64).copy_(values)
    return double.view(values.shape[0], groups, -1).sum(-1)
