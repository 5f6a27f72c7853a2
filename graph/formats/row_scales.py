"""The two kinds of fitted scales: one number a group of columns of a row, or a low-rank product. Both solve row by row.

Given levels, a row's scales minimise ``sum_i m_i (w_i - q_i s_i)^2``; rows do not depend on one another, so a weight
is worked on in slices of rows. Only the columns of low-rank scales are solved for over all rows.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from graph.formats.format import has_data
from graph.formats.least_squares import descend
from graph.formats.scales import low_rank_of_groups, normal_form


class RowScales(Protocol):
    """Scales S of a weight [out, in] that can be solved for."""

    def of(self, rows: slice) -> Tensor:
        """S of some rows, f32 [rows, in]."""
        ...

    def solve_rows(self, rows: slice, squares: Tensor, products: Tensor) -> None:
        """Solve for what belongs to some rows.

        squares, products: f32 [rows, in], ``m q q`` and ``m q w`` of the weight w and its levels q
        """
        ...

    def times(self, rows: slice, factor: float) -> None:
        """Multiply the scales of some rows."""
        ...

    def copy(self) -> RowScales:
        """The same scales, apart from what is done to these."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """By the names that they have in ``Fitted``."""
        ...


class GroupScales:
    """One scale a group of columns of a row: s [out, groups], positive."""

    def __init__(self, s: Tensor, columns: int) -> None:
        self.s, self.columns = s, columns

    def of(self, rows: slice) -> Tensor:
        s = self.s[rows]
        width = self.columns // s.shape[1]
        return s[:, :, None].expand(-1, -1, width).reshape(-1, self.columns)

    def solve_rows(self, rows: slice, squares: Tensor, products: Tensor) -> None:
        """``s = sum m w q / sum m q^2``; a group for which that is not positive keeps its scale."""
        s = self.s[rows]
        found = products.view(*s.shape, -1).sum(-1) / squares.view(*s.shape, -1).sum(-1)
        self.s[rows] = torch.where((found > 0) & found.isfinite(), found, s)

    def times(self, rows: slice, factor: float) -> None:
        self.s[rows] *= factor

    def copy(self) -> GroupScales:
        return GroupScales(self.s.clone(), self.columns)

    def tensors(self) -> dict[str, Tensor]:
        return {"scale": self.s}


class LowRankScales:
    """A product of a [out, r] and b [r, in]. The factor that is held is orthonormal while the other is solved for."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.a, self.b = a, b

    @staticmethod
    def of_groups(s: Tensor, group: int, columns: int, rank: int) -> LowRankScales:
        a, g, b = low_rank_of_groups(s, group, columns, rank)
        return LowRankScales(a * g, b)

    def of(self, rows: slice) -> Tensor:
        return self.a[rows] @ self.b

    def solve_rows(self, rows: slice, squares: Tensor, products: Tensor) -> None:
        b, turned = self.b, self.b.t().contiguous()  # read in order, half the time of a small product
        right = products @ turned
        self.a[rows] = descend(lambda x: (x @ b).mul_(squares) @ turned, right, self.a[rows], dim=1)

    def begin_columns(self) -> None:
        """Hold a, made orthonormal."""
        self.a, r = torch.linalg.qr(self.a)
        self.b = r @ self.b

    def solve_columns(self, columns: slice, squares: Tensor, products: Tensor) -> None:
        """Solve for some columns; the moments would stand on both sides of the equations of each.

        squares, products: f32 [out, columns], ``q q`` and ``q w``
        """
        a = self.a
        right = a.t() @ products
        self.b[:, columns] = descend(lambda x: a.t() @ (a @ x).mul_(squares), right, self.b[:, columns], dim=0)

    def orthonormal(self) -> LowRankScales:
        """The same product, holding b, its rows made orthonormal."""
        if not has_data(self.a):
            return self
        q, r = torch.linalg.qr(self.b.t())
        return LowRankScales(self.a @ r.t(), q.t().contiguous())

    def times(self, rows: slice, factor: float) -> None:
        self.a[rows] *= factor

    def copy(self) -> LowRankScales:
        return LowRankScales(self.a.clone(), self.b.clone())

    def tensors(self) -> dict[str, Tensor]:
        if not has_data(self.a):
            return {"a": self.a, "g": self.a.new_empty(self.a.shape[1]), "b": self.b}
        a, g, b = normal_form(self.a, self.b)
        return {"a": a, "g": g, "b": b}
