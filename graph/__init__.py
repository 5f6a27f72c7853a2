"""The model as a graph: capture it, name its sites, print it, edit it.

Names are imported on first use: reading a recipe or printing help does not load torch. Modules that register ops
are listed in ``graph.ops.OP_MODULES``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "capture": "tracing", "capture_module": "tracing", "Graph": "core", "NamedTensor": "core", "TensorInfo": "core",
    "QcError": "errors", "QcErrors": "errors", "raise_all": "errors", "Selector": "select", "Site": "sites",
}  # fmt: skip

if TYPE_CHECKING:
    from graph.core import Graph as Graph
    from graph.core import NamedTensor as NamedTensor
    from graph.core import TensorInfo as TensorInfo
    from graph.errors import QcError as QcError
    from graph.errors import QcErrors as QcErrors
    from graph.errors import raise_all as raise_all
    from graph.select import Selector as Selector
    from graph.sites import Site as Site
    from graph.tracing import capture as capture
    from graph.tracing import capture_module as capture_module


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'graph' has no attribute {name!r}")
    value = getattr(import_module(f"graph.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
