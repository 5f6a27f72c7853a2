"""Keys and values as a server keeps them: FP8, with one scale for all keys of an attention and one for its values.

    before    y = qc.attention(q, k, v, mask)
    after     k' = qc.fake_quantize_input(k, fp8, 0, scale=…)
              v' = qc.fake_quantize_input(v, fp8, 0, scale=…)
              y = qc.attention(q, k', v', mask)

Keys are those that attention reads, turned by their positions. Queries stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graph import Graph, QcError, Site, TensorInfo
from graph.core import Streaming
from graph.formats import fake_quantize_input
from graph.ops import op_name
from graph.sites import node_name
from runtimes.serving.layout import cache_scale

OP = "qc.attention"
_PROJECTIONS = ("attn.k", "attn.kv", "attn.qkv")


@dataclass(frozen=True)
class Cache:
    """An attention whose keys and values are kept."""

    site: Site
    attention: str
    """The name of its module in a checkpoint."""


def caches_of(graph: Graph) -> tuple[list[Cache], list[QcError]]:
    """Every attention of the graph, and why scales of its cache cannot be written."""
    if graph.kind != "causal-lm":
        return [], [QcError("an encoder keeps no keys and values", fix="take kv_cache out")]
    names = {
        (site.stack, site.block): site.name.rpartition(".")[0]
        for site in graph.sites("aten.linear")
        if site.role in _PROJECTIONS
    }
    sites = graph.sites(OP)
    unknown = next((site for site in sites if (site.stack, site.block) not in names), None)
    if unknown is not None or not sites:
        where = None if unknown is None else unknown.name
        what = "attention here has no linear that makes its keys, under which scales would be written"
        return [], [QcError(what, site=where, fix="take kv_cache out")]
    return [Cache(site, names[site.stack, site.block]) for site in sites], []


def largest_kept(graph: Graph, rows: Iterable[Tensor]) -> dict[str, tuple[float, float]]:
    """The largest magnitudes of keys and values over rows of tokens [B, T], by the name of the attention."""
    twin = graph.copy()
    if twin.dtype == torch.float16:
        twin.to(torch.float32)  # what fp16 makes infinite has a size
    watcher = _Watcher(twin)
    for ids in rows:
        watcher.run_with({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return {cache.attention: watcher.largest[cache.site.name] for cache in caches_of(graph)[0]}


class _Watcher(Streaming):
    def __init__(self, graph: Graph):
        super().__init__(graph)
        self.largest: dict[str, tuple[float, float]] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_function" and op_name(n.target) == OP:
            before = self.largest.get(node_name(n), (0.0, 0.0))
            found = [float(self.env[node].abs().amax()) for node in n.args[1:3]]  # type: ignore[index]
            self.largest[node_name(n)] = (max(before[0], found[0]), max(before[1], found[1]))
        return super().run_node(n)


def round_kept(graph: Graph, largest: Mapping[str, tuple[float, float]], dtype: torch.dtype) -> None:
    """Round keys and values of every attention, under scales in ``dtype``."""
    for cache in caches_of(graph)[0]:
        for number, which, seen in zip((1, 2), "kv", largest[cache.attention], strict=True):
            node, name = cache.site.node, f"{cache.attention}.{which}_scale"
            info = TensorInfo(kind="buffer", pinned=True, saved=False)
            scale = graph.add_tensor(name, cache_scale(seen, dtype).float(), before=node, info=info)
            kept = cache.site.input(number)
            rounded = graph.insert(
                fake_quantize_input, kept, "fp8", 0, name=f"{cache.attention}/{which}", before=node, role="other",
                scale=scale,
            )  # fmt: skip
            cache.site.set_input(number, rounded)
