"""Exports of many architectures are verified: what is saved computes what the graph does."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtimes.verify import verify
from tests.runtimes.ane.models import random
from tests.runtimes.coreml.exports import write
from tests.runtimes.test_verify_packages import same_process  # noqa: F401  a fixture

NAMES = (
    "llama", "qwen2", "mistral", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "gpt2", "opt", "gpt_neox",
    "starcoder2", "granite", "olmo", "nemotron", "arcee", "bert", "roberta", "mpnet", "modernbert",
)  # fmt: skip
"""Not olmo2: it norms what the attention of small random weights gives, and mode ``ane`` takes numbers so small for 0."""

QUICK = ("llama", "mpnet")


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_an_export_of_this_architecture_is_right(name: str, tmp_path: Path) -> None:
    graph = random(name)
    found = verify(write(graph, tmp_path), graph)
    assert found.passed, found.table()
