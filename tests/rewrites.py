"""Compare a graph's text before and after a pass."""

from __future__ import annotations

from textwrap import dedent

from torch import Tensor, nn

from graph import Graph, capture_module
from passes.base import Pass
from passes.runner import apply


def assert_rewrites(step: Pass, model: nn.Module, *example: Tensor, before: str, after: str) -> Graph:
    """Capture ``model``, check its text, apply ``step``, check the text again; return the result."""
    graph = capture_module(model, *example)
    assert str(graph) == dedent(before).strip()
    report = apply(step, graph)
    assert str(graph) == dedent(after).strip()
    assert bool(report.changed) == (before != after)
    return graph
