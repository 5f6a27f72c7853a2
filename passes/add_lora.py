"""Train a low-rank update beside frozen linears.

    before    up = linear(x, W)
    after     up = linear(x, W)
              up/lora.default = qc.lora(up, x, up.lora_A.default.weight, up.lora_B.default.weight, 16)

W may be packed. Like PEFT, the pass freezes every tensor that is not LoRA's, except those that ``set-trainable`` put
into a group. Several passes with several ``set`` names add up. A second run with the same set is an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch

from graph import Graph, QcError, QcErrors, Selector, Site, raise_all
from graph.adapter import load_adapter, plan_adapter
from graph.lora_base import in_out
from graph.lora_sets import Shape, attach, conflicts, initial, updates
from passes.base import BLOCK_WEIGHTS, Exact, Lossy, Pass, Report

FROM_FILE = ("rank", "alpha", "dropout", "rslora", "dora", "rank_pattern", "alpha_pattern", "init", "seed", "select")
"""Options that an adapter folder answers itself."""


@dataclass(frozen=True, kw_only=True)
class AddLora(Pass):
    """Add a set of LoRA updates to the selected linears; until it is trained it changes nothing."""

    contract = Exact()
    idempotent = False
    after = ("quantize-base",)

    select: Selector = BLOCK_WEIGHTS
    """Which linears; without it all of attention and MLP, as in QLoRA."""

    set: str = "default"
    """The name of the set, and ``lora.<name>`` the group that trains it."""

    rank: int = 8
    """Inner dimension of the update."""

    alpha: float = 16
    """The update is multiplied by alpha / rank."""

    dropout: float = 0.0
    """Share of the update's inputs that are zeroed in training."""

    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead."""

    dora: bool = False
    """Also train the norm of every row of the merged weight (DoRA)."""

    init: Literal["kaiming", "gaussian"] = "kaiming"
    """How A begins: uniform within 1 / sqrt(inputs), as in PEFT, or normal with deviation 1 / rank; B is zero."""

    seed: int = 0
    """Seed of A; each linear draws numbers of its own, whatever else is selected."""

    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Other ranks: globs over the names of linears, the first that fits counts."""

    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Other alphas: globs over the names of linears, the first that fits counts."""

    dtype: Literal["fp32", "model"] = "fp32"
    """Dtype of A and B: fp32 whatever the graph runs in, or the graph's."""

    adapter: str | None = field(default=None, metadata={"path": True})
    """Begin from this adapter folder of PEFT or qc, which also says where, with what rank and so on."""

    def __post_init__(self) -> None:
        raise_all(list(self._mistakes()))
        if self.adapter is not None:
            object.__setattr__(self, "contract", Lossy(min_psnr_db=-math.inf, min_weight_snr_db=math.inf))

    def _mistakes(self) -> Iterator[QcError]:
        if not re.fullmatch(r"[A-Za-z_]\w*", self.set):
            yield QcError(f"set {self.set!r} cannot be part of a tensor's name", fix="use letters, digits and _")
        for key, rank in {
            "rank": self.rank,
            **{f"rank_pattern {k!r}": v for k, v in self.rank_pattern.items()},
        }.items():
            if rank < 1:
                yield QcError(f"{key} is {rank}", fix="give a rank of at least 1; 8 to 64 are usual")
        for key, alpha in {
            "alpha": self.alpha,
            **{f"alpha_pattern {k!r}": v for k, v in self.alpha_pattern.items()},
        }.items():
            if not 0 < alpha < math.inf:
                yield QcError(f"{key} is {alpha:g}", fix="give a number above 0; once or twice the rank is usual")
        if not 0 <= self.dropout < 1:
            yield QcError(f"dropout is {self.dropout:g}", fix="give a share from 0 to below 1; 0.05 is usual")
        given = [f.name for f in fields(self) if f.name in FROM_FILE and getattr(self, f.name) != _default(f)]
        if self.adapter is not None and given:
            yield QcError(
                f"{given[0]} is given beside adapter, which says it itself", fix=f"take {' and '.join(given)} out"
            )

    def shape(self, site: Site) -> Shape:
        """What the set is at one linear."""
        rank = next((v for glob, v in self.rank_pattern.items() if fnmatchcase(site.name, glob)), self.rank)
        alpha = next((v for glob, v in self.alpha_pattern.items() if fnmatchcase(site.name, glob)), self.alpha)
        return Shape(rank=rank, alpha=alpha, dropout=self.dropout, rslora=self.rslora, dora=self.dora)

    def check(self, graph: Graph) -> Sequence[QcError]:
        """Linears that have the set already, ranks that do not fit, patterns and selectors that match nothing."""
        try:
            plans = self._plans(graph)
        except QcErrors as errors:
            return errors.errors
        except QcError as error:
            return [error]
        found = conflicts(graph, self.set, plans)
        if self.adapter is None:
            found += [error for site, shape in plans for error in _too_high(site, shape)]
            found += self._unmatched([site.name for site, _ in plans])
        return found

    def _plans(self, graph: Graph) -> list[tuple[Site, Shape]]:
        """Where the set goes, and what it is there."""
        if self.adapter is not None:
            return [(plan.site, plan.shape) for plan in plan_adapter(graph, Path(self.adapter))]
        linears = graph.sites("aten.linear")
        others = [s for s in graph.sites() if self.select.accepts(s, graph.blocks)]
        if others and not any(s.op == "aten.linear" for s in others) and not self.select.allow_empty:
            what = (
                f"select {self.select} matches {others[0].op.removeprefix('aten.')} at {others[0].name}, and no linear"
            )
            raise QcError(
                what,
                fix=f"LoRA goes beside linears; their roles here are {', '.join(sorted({s.role for s in linears}))}",
            )
        return [(site, self.shape(site)) for site in self.select.pick(linears, graph.blocks, what="linear")]

    def _unmatched(self, names: list[str]) -> Iterator[QcError]:
        for option in ("rank_pattern", "alpha_pattern"):
            for glob in getattr(self, option):
                if not any(fnmatchcase(name, glob) for name in names):
                    near = get_close_matches(glob.replace("*", ""), names, n=1, cutoff=0.0)
                    yield QcError(
                        f"{option} {glob!r} matches no selected linear",
                        fix=f"the nearest name is {near[0]}" if near else "take it out",
                    )

    def run(self, graph: Graph) -> Report:
        """Add the set, and freeze what is not trained on purpose."""
        raise_all(self.check(graph))
        plans, pinned = self._plans(graph), self.dtype == "fp32"
        dtype = torch.float32 if pinned else graph.dtype
        for name, info in graph.tensors().items():
            if info.trainable and info.group is None:
                graph.set_info(name, trainable=False)
        if self.adapter is not None:
            load_adapter(graph, Path(self.adapter), self.set, dtype=dtype, pinned=pinned)
        for site, shape in plans if self.adapter is None else []:
            seed = f"{self.seed} {self.set} {site.name}"
            attach(
                graph,
                site,
                self.set,
                shape,
                initial(graph, site, shape, kind=self.init, seed=seed, dtype=dtype),
                pinned=pinned,
            )
        added = [name for update in updates(graph, [self.set]) for name in update.tensors if graph.info(name).trainable]
        values = sum(math.prod(graph.shape(name)) for name in added)
        return Report(
            tuple(f"{site.name}/lora.{self.set}" for site, _ in plans),
            {"linears": len(plans), "trainable_values": values},
        )


def _too_high(site: Site, shape: Shape) -> Iterator[QcError]:
    inputs, out = in_out(site)
    if shape.rank > min(inputs, out):
        what = f"rank {shape.rank} is more than a weight of {out} x {inputs} can have"
        yield QcError(what, fix=f"set rank to at most {min(inputs, out)}", site=site.name)


def _default(option: Any) -> Any:
    return option.default_factory() if callable(option.default_factory) else option.default
