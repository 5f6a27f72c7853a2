"""A graph as it was before a pass, and what shows that a pass has written to a tensor."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graph import Graph

SAMPLES = 1024
"""Values of a tensor that are remembered: a write past autograd's counters shows in them."""


@dataclass(frozen=True)
class Breach:
    """One way in which a pass broke its word."""

    what: str
    site: str | None = None


@dataclass(frozen=True)
class Snapshot:
    """A graph as it was before a pass: its nodes, and a mark on every tensor that shows whether it was written to."""

    graph: Graph
    marks: dict[str, tuple[Any, ...]]

    @staticmethod
    def of(graph: Graph) -> Snapshot:
        """Take it; tensors are shared, not copied."""
        return Snapshot(graph.copy(), {name: mark(graph, name) for name in graph.tensors()})

    def overwritten(self) -> Iterator[str]:
        """The tensors that were written to where they lie, so that what they held before is lost."""
        return (name for name, was in self.marks.items() if mark(self.graph, name) != was)


def mark(graph: Graph, name: str) -> tuple[Any, ...]:
    """Changes when the tensor ``name`` is replaced or written to; costs nothing however large it is."""
    value = graph.module.get_parameter(name) if graph.info(name).kind == "parameter" else graph.module.get_buffer(name)
    version = 0 if value.is_inference() else value._version
    return (value.data_ptr(), version, tuple(value.shape), value.dtype, _sample(value))


def _sample(value: Tensor) -> int:
    if value.is_meta or not value.numel():
        return 0
    flat = value.detach().reshape(-1)
    return hash(flat[:: max(1, flat.numel() // SAMPLES)].cpu().contiguous().view(torch.uint8).numpy().tobytes())


def belongs(name: str, changed: Collection[str]) -> bool:
    """Whether a site or tensor is one of the changed ones, or part of one: ``up.lora_A.default``, ``up/lora.default``.

    ``changed`` holds names as ``parts`` gives them.
    """
    ends = [cut.start() for cut in re.finditer(r"[./]", name)] + [len(name)]
    return any(name[:end] in changed for end in ends)


def parts(names: Iterable[str]) -> frozenset[str]:
    """Names of sites, and the beginnings that the names of their tensors have."""
    kept = frozenset(names)
    return kept | {name.replace("/", ".") for name in kept}


def home(graph: Graph, tensor: str, changed: Collection[str] = ()) -> str:
    """The site that a tensor is blamed on: a changed one that reads it, any that does, or the one it is named after."""
    readers = [site.name for site in graph.sites() if tensor in site.tensors()]
    named = [site.name for site in graph.sites() if belongs(tensor, parts([site.name]))]
    return next((name for name in readers if name in changed), None) or next(iter([*readers, *named[-1:]]), tensor)
