"""Does a value of a graph depend on its own token alone? Decided by the op and by where the length T is in the shapes.

A graph in which nothing but attention and positions looks from one token to another can be run on the new tokens only.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, fx

from graph.errors import QcError
from graph.ops import op_name
from graph.shapes import dims_of, symbolic
from graph.sites import Site

FIX = "leave insert-kv-cache out: generation then reads everything again for each token"

_SIZES_ONLY = frozenset(
    {"aten.view", "aten.reshape", "aten._unsafe_view", "aten.expand", "aten.unflatten.int", "aten.sym_size.int",
     "aten.arange", "aten.arange.start", "aten.arange.start_step",
     "aten.zeros", "aten.ones", "aten.full", "aten.new_zeros", "aten.new_ones", "aten.new_full"}
)  # fmt: skip
"""Ops that may be told the length: as a size of their result, and nothing else."""

_FILLED = frozenset(f"aten.{name}" for name in ("zeros", "ones", "full", "new_zeros", "new_ones", "new_full"))
"""Ops whose result is the same at every token."""

_ALONG = {"aten.cumsum": 1, "aten.cumprod": 1, "aten.cummax": 1, "aten.cummin": 1, "aten.logcumsumexp": 1,
          "aten.softmax.int": 1, "aten._softmax": 1, "aten.log_softmax.int": 1, "aten.layer_norm": 1,
          "aten.sort": 1, "aten.argsort": 1, "aten.topk": 2, "aten.flip": 1, "aten.roll": 2, "aten.cat": 1}  # fmt: skip
"""Ops that mix along the dimension their argument of this number names."""

_NEVER = frozenset(
    {"aten.scaled_dot_product_attention", "aten.conv1d", "aten.conv2d", "aten.convolution", "aten.pad",
     "aten.constant_pad_nd", "aten.group_norm", "aten.batch_norm", "aten.gather", "aten.scatter.src",
     "aten.index_select"}
)  # fmt: skip
"""Ops that are taken to mix tokens wherever they see several."""


def refuse(site: Site, why: str) -> QcError:
    """The error of a site that stands in the way of a cache."""
    return QcError(f"{site.name} {why}", site=site.name, fix=FIX)


def mixing(site: Site) -> QcError | None:
    """How ``site`` mixes tokens; None where each of its values depends on its own token alone."""
    node, op = site.node, site.op
    if any(_is_length(n) for n in node.all_input_nodes) and op not in _SIZES_ONLY and not op.startswith("py."):
        return refuse(site, f"computes with the number of tokens ({op})")
    results = sizes_of(node)
    if not results:
        return None  # a number
    long = [n for n in node.all_input_nodes if _has_length(n)]
    if long and op in _NEVER:
        return refuse(site, f"looks from one token to others ({op})")
    if long and _along(node, long[0]):
        return refuse(site, f"runs along the tokens ({op})")
    if long and not _has_length(node):
        return refuse(site, f"makes one value of all tokens ({op})")
    if _has_length(node) and not long and op not in _FILLED:
        return refuse(site, f"counts tokens from the start of what it is given ({op})")
    for dims in results:
        if sum(map(_named, dims)) > 1:
            return refuse(site, f"compares tokens with each other: its shape is [{', '.join(dims)}]")
        if any(_named(d) and re.search(r"[+\-(]", d) for d in dims):
            return refuse(site, f"cuts or joins along the tokens: its shape is [{', '.join(dims)}]")
    return None


def from_mask_alone(node: Any) -> bool:
    """Whether a value is the attention mask itself, cast or given the same shape again."""
    same = ("aten.to.dtype", "aten.view", "aten.reshape")
    while isinstance(node, fx.Node) and node.op == "call_function" and op_name(node.target) in same:
        if dims_of(node) != ("B", "T"):
            return False
        node = node.args[0]
    return isinstance(node, fx.Node) and node.op == "placeholder" and node.target == "attention_mask"


def _along(node: fx.Node, source: fx.Node) -> bool:
    """Whether an op that runs along a dimension does so along the tokens."""
    op = op_name(node.target)
    at = _ALONG.get(op)
    if at is None:
        return False
    (sizes, *_) = sizes_of(source)
    default = 0 if op == "aten.cat" else -1
    dim: Any = node.args[at] if at < len(node.args) else node.kwargs.get("dim", default)
    if op == "aten.layer_norm":  # it names sizes, not dimensions
        dim = range(-len(dim), 0)
    wanted = [dim] if isinstance(dim, int) else range(len(sizes)) if dim is None else dim
    return any(_named(sizes[d]) for d in wanted)


def _is_length(node: fx.Node) -> bool:
    """Whether a node is a number that moves with the number of tokens."""
    vals = node.meta["vals"]
    return isinstance(vals[0], (int, float)) and not isinstance(vals[0], bool) and vals[2] != vals[0]


def _has_length(node: fx.Node) -> bool:
    return any(_named(size) for sizes in sizes_of(node) for size in sizes)


def sizes_of(node: fx.Node) -> list[tuple[str, ...]]:
    """The sizes of each tensor a node returns."""
    if isinstance(node.meta["val"], Tensor):
        return [dims_of(node)]
    if not isinstance(node.meta["val"], (list, tuple)):
        return []
    tensors = [elements for elements in zip(*node.meta["vals"], strict=True) if isinstance(elements[0], Tensor)]
    return [tuple(symbolic([e.shape[i] for e in elements]) for i in range(elements[0].dim())) for elements in tensors]


def _named(dim: str) -> bool:
    return "T" in re.findall(r"[A-Z]", dim)
