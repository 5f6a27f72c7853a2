"""An assessment as a picture."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from runtimes.assess.assess import Assessment
from runtimes.assess.crossing import falling
from runtimes.data.disk import explained

MISSING = "no assess.png: matplotlib is not installed; pip install 'qc-compiler[plots]'"


def draw(found: Assessment, path: Path, title: str) -> str | None:
    """Draw accuracy and noise scale by level to ``path``; return a note where that cannot be done."""
    if importlib.util.find_spec("matplotlib") is None:
        return MISSING
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    levels = list(range(1, len(found.levels) + 1))
    accuracies = [one.accuracy for one in found.levels]
    axes.plot(levels, accuracies, "o", color="#1f5fa8", label="accuracy")
    axes.plot(levels, falling(accuracies), color="#1f5fa8", linewidth=1.2, label="falling curve")
    axes.axhspan(found.target - found.tolerance, found.target + found.tolerance, color="#d1622b", alpha=0.15)
    axes.axhline(found.target, color="#d1622b", linewidth=1, label="target")
    if found.crossing.level is not None:
        axes.axvline(found.crossing.level, color="#d1622b", linestyle="--", linewidth=1)
    axes.set(xlabel="level", ylabel="accuracy", title=f"{title}: {found.crossing.said}", ylim=(0, 1))
    noise = axes.twinx()
    noise.plot(levels, [one.gradients.noise_scale for one in found.levels], color="#8a8a8a", label="noise scale")
    noise.set(ylabel="gradient noise scale", yscale="log")
    axes.legend(loc="upper right")
    noise.legend(loc="lower left")
    FigureCanvasAgg(figure)
    with explained("the plot", path.parent):
        figure.savefig(path, dpi=120)
    return None
