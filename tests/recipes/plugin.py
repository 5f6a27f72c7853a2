"""Passes of another distribution, as tests see them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from graph import QcError
from passes.base import Exact, Pass


@dataclass(frozen=True, kw_only=True)
class Squeeze(Pass):
    """Store weights in few bits."""

    contract = Exact()

    scheme: Literal["nf4", "fp4", "int8"] = "nf4"
    """Format of the stored weights."""

    bits: int = 4
    """Bits per weight, 2 to 8."""

    block: int = 64
    """Weights that share one scale."""

    double: bool = True
    """Store the scales in few bits as well."""

    scale: float = 1.0
    """Factor on the scales."""

    keep: tuple[str, ...] = ("embed", "head", "norm")
    """Roles that stay as they are."""

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise QcError(f"bits cannot be {self.bits}", fix="set bits to 2 to 8")


@dataclass(frozen=True, kw_only=True)
class Adapt(Pass):
    """Add something small that trains."""

    contract = Exact()

    after = ("squeeze",)

    rank: int
    """Rank of the update."""

    alpha: float | None = None
    """Scale of the update times the rank."""

    pattern: dict[str, int] | None = None
    """Ranks of single sites, by glob."""

    start: str | None = field(default=None, metadata={"path": True})
    """File to begin from."""


@dataclass(frozen=True, kw_only=True)
class Seal(Pass):
    """Let nothing be changed any more."""

    contract = Exact()

    after = ("squeeze", "adapt")


class NotAPass:
    """Something else."""
