"""What ONNX Runtime computes of an architecture is what its graph computes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.architectures import CAUSAL, ENCODERS, REFUSED
from tests.runtimes.ane.models import random
from tests.runtimes.onnx.running import difference, written

EXPORTED = sorted({*CAUSAL, *ENCODERS} - {*REFUSED, "t5_encoder"})
"""All but T5, of which AutoModel makes both halves."""


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "phi", "gpt2", "bert"])
def test_an_architecture_computes_what_its_graph_does_on_random_shapes(name: str, tmp_path: Path) -> None:
    graph = random(name)
    assert difference(graph, written(graph, tmp_path / "out")) < 5e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTED)
def test_every_architecture_that_can_be_captured_can_be_exported(name: str, tmp_path: Path) -> None:
    graph = random(name)
    assert difference(graph, written(graph, tmp_path / "out")) < 5e-6
