"""Weights that a server multiplies as one: those of q, k and v, and those of gate and up, where they read the same.

Such weights have one global scale of NVFP4 between them, and one scale of FP8 if that is of a whole weight: a server
that fuses them takes the largest for all, and rounds again what was under another one.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from graph.core import Graph
from graph.formats.ahead import worked_ahead
from graph.formats.format import has_data
from graph.formats.memory import lent
from graph.formats.scales_of import magnitudes
from graph.sites import Site

FUSED_ROLES = (("attn.q", "attn.k", "attn.v"), ("mlp.gate", "mlp.up"))
"""The roles whose linears servers fuse."""


def fused_weights(sites: Mapping[str, Site]) -> list[list[str]]:
    """The weights that are fused, of those given by the linear that reads them; groups of two and more."""
    groups: dict[tuple[fx.Node, int], list[str]] = {}
    for weight, site in sites.items():
        for number, roles in enumerate(FUSED_ROLES):
            if site.op == "aten.linear" and site.role in roles:
                groups.setdefault((site.input(0), number), []).append(weight)
    return [group for group in groups.values() if len(group) > 1]


def shared_largest(graph: Graph, sites: Mapping[str, Site]) -> dict[str, float]:
    """The largest magnitude in all weights of a group, for every weight in one; nothing of a plan.

    One weight is read at a time by each thread.
    """

    def largest_of(group: list[str]) -> tuple[list[str], float | None]:
        values = (graph.tensor(name, lent).detach() for name in group)
        largest = [float(magnitudes(w, w.shape[1]).amax()) for w in values if has_data(w)]
        return group, max(largest, default=None)

    threads = None if graph.device.type == "cpu" else 1
    found = worked_ahead(largest_of, fused_weights(sites), threads)
    return {name: largest for group, largest in found if largest is not None for name in group}
