"""qc: compile a Hugging Face model by recipe into a low-bit model that runs.

>>> import qc
>>> graph = qc.capture("seedling")                          # doctest: +SKIP
>>> artifact = qc.compile("recipe.yaml", set={"lora.rank": 8})  # doctest: +SKIP
>>> qc.export(artifact, target="safetensors", out="out/")   # doctest: +SKIP

Everything is imported on first use, so ``import qc`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "capture": "graph", "capture_module": "graph", "Graph": "graph", "Site": "graph", "Selector": "graph",
    "TensorInfo": "graph", "QcError": "graph.errors", "QcErrors": "graph.errors", "op": "graph.ops",
    "Artifact": "graph.artifact", "load": "graph.artifact", "save_adapter": "graph.adapter",
    "Pass": "passes.base", "Report": "passes.base", "Exact": "passes.base", "Close": "passes.base",
    "Lossy": "passes.base", "TrainingOnly": "passes.base", "apply": "passes.runner",
    "compile": "qc.api", "train": "qc.api", "export": "qc.api", "evaluate": "qc.api", "generate": "qc.api",
    "run": "qc.api",
}  # fmt: skip

__all__ = list(_HOMES)

if TYPE_CHECKING:
    from graph import Graph as Graph
    from graph import QcError as QcError
    from graph import QcErrors as QcErrors
    from graph import Selector as Selector
    from graph import Site as Site
    from graph import TensorInfo as TensorInfo
    from graph import capture as capture
    from graph import capture_module as capture_module
    from graph.adapter import save_adapter as save_adapter
    from graph.artifact import Artifact as Artifact
    from graph.artifact import load as load
    from graph.ops import op as op
    from passes.base import Close as Close
    from passes.base import Exact as Exact
    from passes.base import Lossy as Lossy
    from passes.base import Pass as Pass
    from passes.base import Report as Report
    from passes.base import TrainingOnly as TrainingOnly
    from passes.runner import apply as apply
    from qc.api import compile as compile
    from qc.api import evaluate as evaluate
    from qc.api import export as export
    from qc.api import generate as generate
    from qc.api import run as run
    from qc.api import train as train


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"qc has no {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
