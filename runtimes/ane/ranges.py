"""What of a graph would not fit fp16 numbers, seen on real text before anything is written.

The graph runs in fp32. What is handed from op to op must stay within 65504, and what a matrix product gives within
32768: where the engine's sums go beyond that, they come out as infinity (rule N2). Packages multiply with levels and
scales apart, so of such weights the product before its scale is looked at too: ``Q (b_k x)`` of every rank, ``Q x``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from graph import Graph, QcError
from graph.core import Streaming
from graph.ops import op_name, repeat_heads
from graph.probe import vocabulary
from graph.sites import node_name, tag
from graph.tokenizer import has_tokenizer, load_tokenizer
from runtimes.ane.memory import any_memory
from runtimes.ane.weights import Weight, weight_of
from runtimes.stdlib_text import read_text, stdlib_files

LARGEST = 65504.0
PRODUCT = 32768.0
PRODUCTS = frozenset({"aten.linear", "aten.matmul", "aten.bmm", "qc.attention", "qc.linear_lut_factored"})
WEIGHTED = {"aten.linear": 1, "qc.linear_lut_factored": None}
"""Linear -> which argument is its weight; None where it is its own."""

STREAM = frozenset({"embed", "attn.o", "mlp.down", "block_out"})
"""Roles of what makes up the residual stream."""

AT_ONCE = 128
"""Tokens of a row."""

LARGEST_TOKENS = 8
"""Of a row, the tokens with the largest values, on which products before their scale are computed."""

UNSCALED = "quantize it with scale: channel or with fewer ranks, or hold it in fp16"


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
    if tokenizer is None or not has_tokenizer(tokenizer):
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
    memory = any_memory(twin, AT_ONCE)
    for ids in rows:
        watcher.run_with({"input_ids": ids, "attention_mask": torch.ones_like(ids), **memory})
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
        if peak.site.endswith(_BEFORE):
            fix = UNSCALED
        yield QcError(what, site=peak.site, fix=fix)


_BEFORE = "/before its scale"


def unscaled(weight: Weight, x: Tensor) -> Tensor | None:
    """What a convolution makes of x [tokens, columns] before its scales, the largest of each row.

    None where there is nothing behind it.
    """
    if weight.kind == "int8":
        values, scale, lift = weight.integers()
        kernel = torch.from_numpy(values).float() * torch.from_numpy(scale).float()[:, None]
        return None if lift == 1 else (x @ kernel.T).abs().amax(0)
    if weight.kind not in ("lut", "low-rank") or not (weight.rank or weight.row_scale):
        return None
    indices, levels = (torch.from_numpy(part) for part in weight.table())
    kernel = _values(weight, indices, levels.float())
    scales = torch.from_numpy(weight.factors()[1]).float() if weight.rank else torch.ones(1, weight.columns)
    return torch.stack([((x * b) @ kernel.T).abs().amax(0) for b in scales]).amax(0)


def _values(weight: Weight, indices: Tensor, levels: Tensor) -> Tensor:
    """What the indices of a LUT stand for, f32 [rows, columns]."""
    if weight.vector > 1:
        return levels[indices.long()].movedim(-1, 1).reshape(weight.rows, weight.columns)
    tables = levels.repeat_interleave(weight.rows // weight.tables, 0)
    return tables.expand(weight.rows, -1).gather(1, indices.long())


class _Watcher(Streaming):
    """Runs a graph, and keeps of every value but its largest magnitude."""

    def __init__(self, graph: Graph, sites: Collection[str]):
        super().__init__(graph)
        self.sites = sites
        self.largest: dict[fx.Node, float] = {}
        self.scores: dict[fx.Node, float] = {}
        self.products: dict[fx.Node, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_function" and op_name(n.target) == "qc.attention":
            self._note(self.scores, n, self._scores(n))
        if n.op == "call_function" and op_name(n.target) in WEIGHTED and node_name(n) in self.sites:
            self._note_product(n)
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
        for node, value in self.products.items():
            yield Peak(f"{node_name(node)}{_BEFORE}", False, value, PRODUCT)

    def _note_product(self, node: fx.Node) -> None:
        """The largest products of a linear before its scales, on the tokens with the largest values."""
        at = WEIGHTED[op_name(node.target)]
        source = node if at is None else node.args[at]
        assert isinstance(source, fx.Node) and isinstance(node.args[0], fx.Node)
        x = self.env[node.args[0]].float().flatten(0, -2)
        most = x.abs().amax(-1).topk(min(LARGEST_TOKENS, len(x))).indices
        found = unscaled(weight_of(self.source, source, node_name(node)), x[most])
        if found is not None:
            self._note(self.products, node, found)

    def _scores(self, node: fx.Node) -> Tensor:
        """Queries times keys."""
        q, k = (self.env[arg] for arg in node.args[:2] if isinstance(arg, fx.Node))
        scale = node.args[4] if len(node.args) > 4 else None
        factor = q.shape[-1] ** -0.5 if scale is None else float(str(scale))
        return torch.matmul(q * factor, repeat_heads(k, q.shape[1] // k.shape[1]).mT)

    def _note(self, where: dict[fx.Node, float], node: fx.Node, value: Tensor) -> None:
        largest = float(torch.linalg.vector_norm(value.float(), ord=torch.inf)) if value.numel() else 0.0
        where[node] = max(largest, where.get(node, 0.0))
