"""Small models as ONNX, and what ONNX Runtime makes of them beside what their graphs compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graph import Graph
from runtimes.export.onnx import export
from runtimes.onnx.session import Session


def written(graph: Graph, folder: Path, **options: Any) -> Path:
    """The export of a graph, in fp32 unless it says otherwise."""
    return export(graph, folder, **{"dtype": "fp32", **options}).folder


def batch(rows: int, length: int, vocabulary: int, padded: int = 0) -> dict[str, Tensor]:
    """Random tokens, so many of the last row padded on the right."""
    ids = torch.randint(5, vocabulary, (rows, length))
    mask = torch.ones_like(ids)
    if padded:
        mask[-1, -padded:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def difference(graph: Graph, folder: Path, vocabulary: int = 99) -> float:
    """The largest difference from the graph, over batches and lengths of many kinds, padding left out."""
    session, exact = Session(folder, threads=1), graph.copy().to(torch.float32)
    worst = 0.0
    for given in (
        batch(2, 24, vocabulary),
        batch(3, 17, vocabulary, 5),
        batch(1, 1, vocabulary),
        batch(4, 31, vocabulary, 30),
    ):
        found = session.run(given)[session.outputs[0]].float()
        with torch.no_grad():
            wanted = exact(**given)
        real = given["attention_mask"].bool()
        worst = max(worst, (found[real] - wanted[real]).abs().max().item())
    return worst
