"""What compression did to each weight, and to the text that the model expects."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from graph import Graph, QcError
from graph.formats import dense_value, packed_sites, weight_name
from graph.formats.lut_scales import row_parts
from runtimes.data.disk import explained

WORST = 10
"""Weights that are listed."""

VERDICTS = (
    (0.01, "as good as the model"),
    (0.05, "a little worse than the model; most uses will not notice"),
    (0.10, "worse than the model; train it, or train it longer, before it is used"),
    (0.50, "much worse than the model; train it longer, keep more weights, or give scales to smaller groups"),
    (math.inf, "no longer the model; what was packed has to be trained before it is of use"),
)
"""Growth of perplexity, or what a correlation is below 1, up to which a sentence holds."""


@dataclass(frozen=True)
class WeightError:
    """One packed weight beside the one of the model."""

    name: str
    values: int
    relative_error: float
    """|packed - model| / |model|"""

    zero_share: float


def profile(graph: Graph, model: Graph) -> list[WeightError]:
    """Every packed weight of ``graph`` beside that of the graph before the passes, the worst first."""
    known, found = model.tensors(), []
    for site in packed_sites(graph):
        name = weight_name(site)
        if name not in known:
            raise QcError(f"the model has no {name}", fix="compare with the model that the artifact was made of")
        found.append(_compared(name, dense_value(graph, site, torch.float32), model.tensor(name)))
    if not found:
        raise QcError("nothing in the graph is packed", fix="give an artifact with quantized weights")
    return sorted(found, key=lambda one: -one.relative_error)


def _compared(name: str, packed: Tensor, model: Tensor) -> WeightError:
    difference = size = 0.0
    for part in row_parts(*model.shape):
        rows = model[part].float()
        difference += float((packed[part] - rows).square().sum(dtype=torch.float64))
        size += float(rows.square().sum(dtype=torch.float64))
    zeros = int((packed == 0).sum()) / packed.numel()
    return WeightError(name, packed.numel(), math.sqrt(difference / size) if size else 0.0, zeros)


def verdict(before: float, after: float) -> str:
    """What two perplexities come to, in plain words."""
    grown = after / before - 1
    words = next(words for most, words in VERDICTS if grown <= most)
    change = f"{grown:.1%} more" if grown >= 0 else f"{-grown:.1%} less"
    return f"perplexity {before:.2f} before and {after:.2f} after, {change}: {words}"


def verdict_on_vectors(cosine: float, spearman: float) -> str:
    """The same of an encoder: how near its vectors are to the model's, and how it ranks texts by them."""
    words = next(words for most, words in VERDICTS if 1 - spearman <= most)
    near = f"vectors have a cosine of {cosine:.3f} with the model's"
    return f"{near}, and rank texts with a correlation of {spearman:.3f}: {words}"


def draw(found: Sequence[WeightError], path: Path, title: str) -> str | None:
    """Draw the errors in the order of the layers to ``path``; return a note where that cannot be done."""
    if importlib.util.find_spec("matplotlib") is None:
        return f"no {path.name}: matplotlib is not installed; pip install 'qc-compiler[plots]'"
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ordered = sorted(found, key=lambda one: one.name)
    figure = Figure(figsize=(8, max(3.0, 0.18 * len(ordered))), layout="constrained")
    axes = figure.add_subplot()
    worst = {one.name for one in found[:WORST]}
    colours = ["#d1622b" if one.name in worst else "#9db7d5" for one in ordered]
    axes.barh([one.name for one in ordered], [one.relative_error for one in ordered], color=colours)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=6)
    axes.set(xlabel="relative error", title=title)
    FigureCanvasAgg(figure)
    with explained("the plot", path.parent):
        figure.savefig(path, dpi=120)
    return None
