"""The losses as a picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

from runtimes.data.disk import explained
from runtimes.train.metrics import EXACT

MISSING = "no loss.png: matplotlib is not installed; pip install 'qc-compiler[plots]'"


def draw(rows: Sequence[Mapping[str, float]], path: Path, title: str, heldout: str = "held-out text") -> str | None:
    """Draw the losses of ``rows`` to ``path``, and the share of questions answered; a note where that cannot be.

    ``heldout`` names what was measured on text that is held out.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return MISSING
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    steps, losses = [r["step"] for r in rows], [r["loss"] for r in rows]
    axes.plot(steps, losses, color="#9db7d5", linewidth=0.8, label="training, each step")
    axes.plot(steps, _smooth(losses), color="#1f5fa8", linewidth=1.6, label="training, smoothed")
    evaluated = [(r["step"], r["eval_loss"]) for r in rows if "eval_loss" in r]
    if evaluated:
        axes.plot(*zip(*evaluated, strict=True), color="#d1622b", marker="o", markersize=4, label=heldout)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    exact = [(r["step"], r[EXACT]) for r in rows if EXACT in r]
    if exact:
        beside = axes.twinx()
        beside.plot(*zip(*exact, strict=True), color="#3b8f5a", marker="s", markersize=4, label="held-out questions")
        beside.set(ylabel="answered whole", ylim=(-0.02, 1.02))
    figure.legend(loc="outside lower center", ncols=4)  # below, where no curve runs behind it
    FigureCanvasAgg(figure)
    with explained("the loss plot", path.parent):
        figure.savefig(path, dpi=120)
    return None


def _smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """A moving average that forgets by ``weight`` a step, without the bias of its beginning."""
    smooth, total, norm = [], 0.0, 0.0
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        smooth.append(total / norm)
    return smooth
