"""What of a graph would not fit fp16 numbers, seen on real text before anything is written.

The graph runs in fp32. What is handed from op to op must stay within 65504, and what a matrix product gives within
32768: where the engine's sums go beyond that, they come out as infinity (rule N2).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from graph import Graph, QcError
from graph.artifact import TOKENIZER_FILES, load_tokenizer
from graph.core import Streaming
from graph.ops import op_name, repeat_heads
from graph.probe import vocabulary
from graph.sites import node_name, tag
from runtimes.stdlib_text import read_text, stdlib_files

LARGEST = 65504.0
PRODUCT = 32768.0
PRODUCTS = frozenset({"aten.linear", "aten.matmul", "aten.bmm", "qc.attention", "qc.linear_lut_factored"})
STREAM = frozenset({"embed", "attn.o", "mlp.down", "block_out"})
"""Roles of what makes up the residual stream."""

AT_ONCE = 128
"""Tokens of a row."""


@dataclass(frozen=True)
class Peak:
    """The largest magnitude of what a site gave, and what it may be."""

    site: str
    stream: bool
    """Whether it is of the residual stream, which ``scale-residual`` makes smaller."""

    largest: float
    limit: float


def calibration(graph: Graph, tokenizer: Path | None, tokens: int) -> list[Tensor]:
    """Rows of about so many tokens together: the Python library's own text.

    Without a tokenizer, or with one that makes too few tokens of a text to fill a row, they are random.
    """
    length = min(AT_ONCE, tokens, int(graph.config.get("max_position_embeddings") or AT_ONCE))
    rows = -(-tokens // length) if length else 0
    generator = torch.Generator().manual_seed(0)
    random = [torch.randint(0, vocabulary(graph), (1, length), generator=generator) for _ in range(rows)]
    if tokenizer is None or not any((tokenizer / name).is_file() for name in TOKENIZER_FILES[:-1]):
        return random
    read, found = load_tokenizer(tokenizer, str(tokenizer)), list[Tensor]()
    for text in (read_text(file) for file in stdlib_files("heldout")):
        ids = read(text[: 16 * length])["input_ids"][:length]
        if len(found) < rows and len(ids) == length:
            found.append(torch.tensor([ids]))
    return found or random


def peaks(graph: Graph, rows: Sequence[Tensor], sites: Collection[str]) -> list[Peak]:
    """The largest values of these sites over some rows of tokens, the one nearest to its limit first."""
    twin = graph.copy()
    if twin.dtype == torch.float16:
        twin.to(torch.float32)  # what fp16 makes infinite has a size
    watcher = _Watcher(twin, sites)
    for ids in rows:
        watcher.run_with({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return sorted(watcher.found(), key=lambda peak: -peak.largest / peak.limit)


def beyond(found: Sequence[Peak]) -> Iterator[QcError]:
    """An error for every site that would not fit."""
    for peak in found:
        if peak.largest < peak.limit:
            continue
        what = f"{peak.site} reaches {peak.largest:.4g}, and ends at {peak.limit:g} on the Neural Engine"
        factor = 0.5
        while peak.largest * factor >= peak.limit / 2:
            factor /= 2
        fix = f"add scale-residual: {{factor: {factor:g}}} before quantize-base"
        if not peak.stream:
            fix = "train or choose a model with smaller values here: no pass makes them smaller"
        yield QcError(what, site=peak.site, fix=fix)


class _Watcher(Streaming):
    """Runs a graph, and keeps of every value but its largest magnitude."""

    def __init__(self, graph: Graph, sites: Collection[str]):
        super().__init__(graph)
        self.sites = sites
        self.largest: dict[fx.Node, float] = {}
        self.scores: dict[fx.Node, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_function" and op_name(n.target) == "qc.attention":
            self._note(self.scores, n, self._scores(n))
        result = super().run_node(n)
        if isinstance(result, Tensor) and node_name(n) in self.sites and result.is_floating_point():
            self._note(self.largest, n, result)
        return result

    def found(self) -> Iterator[Peak]:
        """What was seen."""
        for node, value in self.largest.items():
            stream = str(tag(node, "role", "other")) in STREAM or op_name(node.target) == "aten.add.Tensor"
            limit = PRODUCT if op_name(node.target) in PRODUCTS else LARGEST
            yield Peak(node_name(node), stream, value, limit)
        for node, value in self.scores.items():
            yield Peak(f"{node_name(node)}/scores", False, value, PRODUCT)

    def _scores(self, node: fx.Node) -> Tensor:
        """Queries times keys."""
        q, k = (self.env[arg] for arg in node.args[:2] if isinstance(arg, fx.Node))
        scale = node.args[4] if len(node.args) > 4 else None
        factor = q.shape[-1] ** -0.5 if scale is None else float(str(scale))
        return torch.matmul(q * factor, repeat_heads(k, q.shape[1] // k.shape[1]).mT)

    def _note(self, where: dict[fx.Node, float], node: fx.Node, value: Tensor) -> None:
        largest = float(torch.linalg.vector_norm(value.float(), ord=torch.inf)) if value.numel() else 0.0
        where[node] = max(largest, where.get(node, 0.0))
