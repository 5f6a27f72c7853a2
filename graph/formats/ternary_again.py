"""From ternary to float and back: the scales that are kept meanwhile, and latent weights that begin from them.

Of a weight that is ternary already, the mean magnitude is the old scale times the share of values that are not 0, so
a scale found anew shrinks with every round trip. A latent weight whose mean magnitude *is* the old scale has the same
integers, as thresholds are shares of the mean, and the same scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graph.core import Graph, TensorInfo
from graph.formats.format import has_data
from graph.formats.ternary_rule import TernaryRule

SUFFIX = "_ternary_scale"


def keep_scale(graph: Graph, weight: str, scale: Tensor) -> None:
    """Put the scales that a weight had beside it."""
    reader = next(n for n in graph.module.graph.nodes if n.op == "get_attr" and n.target == weight)
    info = graph.info(weight)
    kept = TensorInfo(kind="buffer", role=info.role, block=info.block, stack=info.stack, pinned=True, saved=False)
    graph.add_tensor(f"{weight}{SUFFIX}", scale.detach().clone(), before=reader, info=kept)


def kept_scale(graph: Graph, weight: str) -> Tensor | None:
    """The scales beside a weight; None where there are none."""
    name = f"{weight}{SUFFIX}"
    return graph.tensor(name) if name in graph.tensors() else None


def drop_scale(graph: Graph, weight: str) -> None:
    """Take the scales beside a weight away."""
    graph.module.graph.eliminate_dead_code()
    graph.remove_tensor(f"{weight}{SUFFIX}")


def with_scale(w: Tensor, scale: Tensor, by: TernaryRule) -> Tensor:
    """``w`` with the magnitudes of each group multiplied so that their mean is ``scale``.

    w: [out, in]    scale: [out, groups], or [1, 1]  ->  like w
    """
    if not has_data(w):
        return w.new_empty(w.shape)
    mean = replace(by, fit="absmean").fitted(w).scale
    factor = (scale.float() / mean).repeat_interleave(w.shape[1] // scale.shape[1], dim=1)
    return (w.float() * factor).to(w.dtype)


@dataclass(frozen=True)
class Starts:
    """``|w - ternary| / |w|`` of each way to begin again: with the scale that was stored, and with ones found anew."""

    stored: float
    least_squares: float
    absmean: float


def starts(w: Tensor, scale: Tensor, by: TernaryRule) -> Starts:
    """Compare the ways to make w [out, in] ternary again."""
    grid = replace(by, fit="absmean").fitted(w)
    squares = replace(by, fit="least-squares").fitted(w)
    found = (grid.with_scale(scale).dense(w), squares.dense(w), grid.dense(w))
    return Starts(*(_distance(one, w) for one in found))


def _distance(made: Tensor, w: Tensor) -> float:
    was = float(w.float().square().sum(dtype=torch.float64))
    return math.sqrt(float((made - w.float()).square().sum(dtype=torch.float64)) / was) if was else 0.0
