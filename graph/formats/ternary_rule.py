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

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from graph.formats.format import has_data
from graph.formats.lut_scales import row_parts

Rule = Literal["dead-zone", "round-clip"]
Fit = Literal["absmean", "least-squares"]

SMALLEST = 1e-8
"""What a scale is at least: that of a row of zeros."""


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

    def fitted(self, w: Tensor, moments: Tensor | None = None) -> Grid:
        """Thresholds and scales of a weight.

        w: [out, in], float    moments: [in], or None
        """
        shape = self.scale_shape(tuple(w.shape))
        if not has_data(w):
            return Grid(*(w.new_empty(shape, dtype=torch.float32) for _ in range(2)))
        sums = torch.zeros((w.shape[0], shape[1]), dtype=torch.float64, device=w.device)
        for part in row_parts(*w.shape):
            sums[part] = sum_by_group(w[part].float().abs(), (1, shape[1]), per_row=True)
        mean = _over_all(sums, shape) / (w.numel() / (shape[0] * shape[1]))
        mean = mean.float().clamp(min=SMALLEST)
        grid = Grid(self._threshold(mean), mean)
        return grid if self.fit == "absmean" else replace(grid, scale=_least_squares(w, grid, moments))

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
        for part in row_parts(*w.shape) if has_data(w) else ():
            here = self.rows(part)
            blocks = here._integers(w[part], dense[part])
            blocks.mul_(here.scale[:, :, None])
        return dense

    def codes(self, w: Tensor) -> Tensor:
        """``q + 1`` of each value, u8 [out, in]."""
        codes = w.new_empty(w.shape, dtype=torch.uint8)
        for part in row_parts(*w.shape) if has_data(w) else ():
            integers = torch.empty(w[part].shape, dtype=torch.float32, device=w.device)
            self.rows(part)._integers(w[part], integers)
            codes[part] = integers.add_(1)
        return codes

    def scale_gradient(self, w: Tensor, grad: Tensor) -> Tensor:
        """``sum(grad * q)`` over the weights that share a scale, in its shape."""
        found = torch.zeros((w.shape[0], self.scale.shape[1]), dtype=torch.float32, device=w.device)
        for part in row_parts(*w.shape) if has_data(w) else ():
            integers = torch.empty(w[part].shape, dtype=torch.float32, device=w.device)
            self.rows(part)._integers(w[part], integers)
            found[part] = sum_by_group(integers.mul_(grad[part]), (1, found.shape[1]), per_row=True)
        return _over_all(found, tuple(self.scale.shape))

    def _integers(self, w: Tensor, out: Tensor) -> Tensor:
        """-1, 0 or 1 of every value of these rows, written to ``out``; a view of that, [rows, groups, columns]."""
        blocks = w.float().view(w.shape[0], self.scale.shape[1], -1)
        there = out.view(blocks.shape)
        torch.sign(blocks, out=there)
        return there.mul_(blocks.abs() >= self.threshold[:, :, None])


def _least_squares(w: Tensor, grid: Grid, moments: Tensor | None) -> Tensor:
    """The scale of least squared error; where nothing counts, the mean magnitude."""
    groups, shape = grid.scale.shape[1], tuple(grid.scale.shape)
    above = torch.zeros((w.shape[0], groups), dtype=torch.float64, device=w.device)
    below = torch.zeros_like(above)
    weight = None if moments is None else moments.to(w.device, torch.float64)
    for part in row_parts(*w.shape):
        magnitude = w[part].float().abs()
        kept = magnitude.view(magnitude.shape[0], groups, -1) >= grid.rows(part).threshold[:, :, None]
        counted = kept.view(magnitude.shape).double() if weight is None else kept.view(magnitude.shape) * weight
        below[part] = sum_by_group(counted, (1, groups), per_row=True)
        above[part] = sum_by_group(counted.mul_(magnitude), (1, groups), per_row=True)
    above, below = _over_all(above, shape), _over_all(below, shape)
    return torch.where(below > 0, above / below, grid.scale.double()).float().clamp(min=SMALLEST)


def sum_by_group(values: Tensor, shape: tuple[int, ...], *, per_row: bool = False) -> Tensor:
    """Sums in fp64 over the weights [out, in] that share one of the scales of this shape, or per row of them too."""
    sums = values.view(values.shape[0], shape[1], -1).sum(-1, dtype=torch.float64)
    return sums if per_row else _over_all(sums, shape)


def _over_all(sums: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Sums by row and group, as those of one scale for the whole tensor where the shape says so."""
    return sums.sum().view(1, 1) if tuple(shape) == (1, 1) and sums.shape[0] > 1 else sums
