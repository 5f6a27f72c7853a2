"""Ops that move values: most of them emit nothing."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from graph import QcError
from graph.shapes import dims_of
from graph.sites import node_name
from runtimes.ane.emitter import Var
from runtimes.ane.lowering import Lowering, Split, Value, features_of, lowers


def refuse(node: fx.Node, what: str) -> QcError:
    """The error of an op that this layout cannot hold."""
    fix = "this model cannot be exported to ane as it is"
    return QcError(f"{node_name(node)} {what}", site=node_name(node), fix=fix)


@lowers(
    "aten.alias", "aten.clone", "aten.contiguous", "aten.expand", "aten.to.dtype", "aten.type_as", "aten.unsqueeze",
    "aten.squeeze.dim", "qc.cast_like", "qc.dropout", "aten.dropout", "qc.ste_fp16", "aten.view", "aten.reshape",
    "aten._unsafe_view", "aten.flatten.using_ints", "aten.unflatten.int",
)  # fmt: skip
def same_memory(low: Lowering, node: fx.Node) -> Value:
    """Casts, copies and views that do not move features past one another."""
    (source,) = [n for n in node.all_input_nodes if n in low.results]
    if _before_tokens(source) != _before_tokens(node):
        raise refuse(node, f"views {_text(source)} as {_text(node)}, across tokens")
    value = low.value(source)
    if math.prod(features_of(node)) != math.prod(value.features):
        raise refuse(node, f"repeats values: {_text(source)} to {_text(node)}")
    return Value(value.var, features_of(node))


@lowers("aten.transpose.int", "aten.permute", "aten.swapaxes", "aten.movedim.int")
def moved(low: Lowering, node: fx.Node) -> Value:
    """Only tokens may move between features."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    old, new = dims_of(source), dims_of(node)
    order = _permutation(node, len(old))
    moved_features = [i for i in order if old[i].isdigit() and old[i] != "1"]
    if moved_features != sorted(moved_features):
        raise refuse(node, f"puts features into another order: {', '.join(old)} to {', '.join(new)}")
    return Value(low.value(source).var, features_of(node))


def _permutation(node: fx.Node, rank: int) -> list[int]:
    args: list[Any] = list(node.args[1:])
    if "permute" in str(node.target):
        return [int(a) % rank for a in args[0]]
    a, b = (int(x) % rank for x in args[:2])
    order = list(range(rank))
    if "movedim" in str(node.target):
        order.insert(b, order.pop(a))
    else:
        order[a], order[b] = order[b], order[a]
    return order


@lowers("aten.slice.Tensor")
def sliced(low: Lowering, node: fx.Node) -> Value:
    """``x[..., start:end]`` along a feature."""
    args = [*node.args, *[None] * 5][:5]
    source, dim, start, end, step = args
    size = _size(node, source, dim)
    begin, stop, _ = slice(start, end).indices(size)
    return cut(low, low.value(source), _feature(node, source, dim), begin, stop, 1 if step is None else int(str(step)))


@lowers("aten.select.int")
def selected(low: Lowering, node: fx.Node) -> Value:
    """``x[..., index]`` along a feature."""
    source, dim, index = node.args
    size, at = _size(node, source, dim), int(str(index))
    axis = _feature(node, source, dim)
    piece = cut(low, low.value(source), axis, at % size, at % size + 1)
    return Value(piece.var, piece.features[:axis] + piece.features[axis + 1 :])


@lowers("aten.chunk", "aten.split.Tensor", "aten.split_with_sizes", "aten.unbind.int")
def pieces(low: Lowering, node: fx.Node) -> Split:
    """Pieces along a feature; each is cut out once."""
    source = node.args[0]
    unbinds = "unbind" in str(node.target)
    dim = [*node.args, 0][1 if unbinds else 2]
    axis = _feature(node, source, dim)
    found, begin = [], 0
    for stand_in in node.meta["val"]:
        size = 1 if unbinds else int(stand_in.shape[dim])
        piece = cut(low, low.value(source), axis, begin, begin + size)
        left = piece.features[:axis] + piece.features[axis + 1 :] if unbinds else piece.features
        found.append(Value(piece.var, left))
        begin += size
    return Split(tuple(found))


@lowers("py.getitem")
def item(low: Lowering, node: fx.Node) -> Value:
    """One of the pieces."""
    source, index = node.args
    assert isinstance(source, fx.Node) and isinstance(index, int)
    whole = low.results[source]
    assert isinstance(whole, Split)
    return whole.values[index]


@lowers("aten.cat")
def joined(low: Lowering, node: fx.Node) -> Value:
    """Values behind one another along a feature."""
    sources: Any = node.args[0]
    dim = node.args[1] if len(node.args) > 1 else 0
    axis = _feature(node, sources[0], dim)
    views = [_along(low, low.value(source), axis) for source in sources]
    return Value(low.emit.op("concat", values=[var for var, _ in views], axis=views[0][1]), features_of(node))


@lowers("aten.stack")
def stacked(low: Lowering, node: fx.Node) -> Value:
    """Values side by side along a new feature."""
    sources: Any = node.args[0]
    dims = dims_of(node)
    at = int(str(node.args[1] if len(node.args) > 1 else 0)) % len(dims)
    axis = sum(size.isdigit() for size in dims[:at])
    widened = [_with_one(low.value(source), axis) for source in sources]
    views = [_along(low, value, axis) for value in widened]
    return Value(low.emit.op("concat", values=[var for var, _ in views], axis=views[0][1]), features_of(node))


def _with_one(value: Value, axis: int) -> Value:
    """The same values with a feature of size 1 more."""
    return Value(value.var, (*value.features[:axis], 1, *value.features[axis:]))


def cut(low: Lowering, value: Value, feature: int, begin: int, end: int, step: int = 1) -> Value:
    """The values ``begin`` to ``end`` of one of the features, or every ``step``-th of them."""
    size = value.features[feature]
    if (begin, end, step) == (0, size, 1):
        return value
    var, axis = _along(low, value, feature)
    first, last = [0] * 4, [int(n) for n in var.shape]
    first[axis], last[axis] = begin, end
    strides = {"stride": [step if i == axis else 1 for i in range(4)]} if step > 1 else {}
    piece = low.emit.op("slice_by_index", x=var, begin=first, end=last, **strides)
    left = (*value.features[:feature], len(range(begin, end, step)), *value.features[feature + 1 :])
    return Value(piece, left)


def _along(low: Lowering, value: Value, feature: int) -> tuple[Var, int]:
    """A shape of four axes in which the feature is one of the middle two: the last is never cut (rule N6)."""
    sizes = value.features
    if len(sizes) == 1:
        return low.channels(value), 1
    if len(sizes) == 2:
        return low.heads(value), 1 + feature
    behind = math.prod(sizes[feature + 1 :]) * low.tokens
    return low.shaped(value, (1, math.prod(sizes[:feature]), sizes[feature], behind)), 2


def _feature(node: fx.Node, source: Any, dim: Any) -> int:
    """Which of the features a dimension is."""
    dims = dims_of(source)
    at = int(dim) % len(dims)
    if not dims[at].isdigit():
        raise refuse(node, f"cuts or joins along {dims[at]} of {_text(source)}")
    return sum(size.isdigit() for size in dims[:at])


def _size(node: fx.Node, source: Any, dim: Any) -> int:
    features = features_of(source)
    return features[_feature(node, source, dim)]


def _before_tokens(node: fx.Node) -> int:
    """How many features of a value lie before its tokens."""
    sizes = dims_of(node)
    at = next((i for i, size in enumerate(sizes) if "T" in size), len(sizes))
    return math.prod(int(size) for size in sizes[:at] if size.isdigit())


def _text(node: Any) -> str:
    return f"[{', '.join(dims_of(node))}]"
