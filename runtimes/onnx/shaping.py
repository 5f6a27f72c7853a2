"""Ops that move values, count them, or take some of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from graph.ops import op_name
from graph.shapes import dims_of
from runtimes.onnx.lowering import (
    Lowering,
    Result,
    axis_of,
    dtype_of,
    fixed,
    given,
    lowers,
    rank_of,
    unlowered,
)

END = 2**63 - 1


@lowers("aten.sym_size.int")
def sym_size(low: Lowering, node: fx.Node) -> Result:
    """How long a value is along an axis."""
    source, axis = node.args[0], node.args[1]
    assert isinstance(source, fx.Node) and isinstance(axis, int)
    return low.size(low.value(source), axis_of(source, axis))


@lowers("aten.view", "aten.reshape", "aten._unsafe_view", "aten.flatten.using_ints", "aten.unflatten.int")
def view(low: Lowering, node: fx.Node) -> Result:
    """The shape of the result: one size that moves is -1, those that stay where they are 0."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return low.op("Reshape", low.value(source), _shape(low, node, source))


def _shape(low: Lowering, node: fx.Node, source: fx.Node) -> str:
    wanted, there = dims_of(node), dims_of(source)
    moving = [i for i, size in enumerate(wanted) if not size.isdigit()]
    sizes = [int(size) if size.isdigit() else 0 for size in wanted]
    foreign = [i for i in moving if i >= len(there) or there[i] != wanted[i]]
    if len(moving) == 1:
        sizes[moving[0]] = -1
        return low.numbers(*sizes)
    if len(foreign) <= 1:
        for i in foreign:
            sizes[i] = -1
        return low.numbers(*sizes)
    asked = node.args[1]
    if not isinstance(asked, (list, tuple)) or len(asked) != len(wanted):
        raise unlowered(node, f"to the shape [{', '.join(wanted)}]")
    return low.sizes([int(w) if w.isdigit() else low.whole(one) for w, one in zip(wanted, asked, strict=True)])


@lowers("aten.reshape_as", "aten.view_as", "aten.expand_as")
def like(low: Lowering, node: fx.Node) -> Result:
    """In the shape of another value."""
    kind = "Expand" if op_name(node.target) == "aten.expand_as" else "Reshape"
    return low.op(kind, low.value(node.args[0]), low.op("Shape", low.value(node.args[1])))


@lowers("aten.transpose.int", "aten.swapaxes", "aten.permute", "aten.t", "aten.numpy_T", "aten.movedim.int")
def permute(low: Lowering, node: fx.Node) -> Result:
    """Axes in another order."""
    source, op = node.args[0], op_name(node.target)
    assert isinstance(source, fx.Node)
    rank, said = rank_of(source), node.args[1:]
    order = list(range(rank))
    if op == "aten.permute":
        asked: Any = said[0]
        order = [int(axis) % rank for axis in asked]
    elif op == "aten.movedim.int":
        at, to = (axis_of(source, axis) for axis in said[:2] if isinstance(axis, int))
        order.insert(to, order.pop(at))
    elif op in ("aten.t", "aten.numpy_T"):
        order.reverse()
    else:
        a, b = (axis_of(source, axis) for axis in said[:2] if isinstance(axis, int))
        order[a], order[b] = order[b], order[a]
    return low.transpose(low.value(source), order)


@lowers("aten.unsqueeze")
def unsqueeze(low: Lowering, node: fx.Node) -> Result:
    """One more axis, of size 1."""
    axis: Any = node.args[1]
    return low.op("Unsqueeze", low.value(node.args[0]), low.numbers(int(axis) % rank_of(node)))


@lowers("aten.squeeze.dim", "aten.squeeze.dims")
def squeeze(low: Lowering, node: fx.Node) -> Result:
    """Without axes of size 1."""
    source, asked = node.args[:2]
    assert isinstance(source, fx.Node)
    listed = asked if isinstance(asked, (list, tuple)) else [asked]
    axes = [axis_of(source, axis) for axis in listed if isinstance(axis, int)]
    axes = [axis for axis in axes if fixed(source, axis) == 1]
    return low.op("Squeeze", low.value(source), low.numbers(*axes)) if axes else low.value(source)


@lowers("aten.expand")
def expand(low: Lowering, node: fx.Node) -> Result:
    """Axes of size 1 as long as they are asked for; -1 is as long as it is."""
    asked: Any = node.args[1]
    sizes = [1 if size == -1 else low.whole(size) for size in asked]
    return low.op("Expand", low.value(node.args[0]), low.sizes(sizes))


@lowers("aten.repeat")
def repeat(low: Lowering, node: fx.Node) -> Result:
    """The whole value so many times along each axis."""
    source, times = node.args[0], node.args[1]
    assert isinstance(source, fx.Node) and isinstance(times, (list, tuple))
    x = low.value(source)
    new = len(times) - rank_of(source)
    if new:
        x = low.op("Unsqueeze", x, low.numbers(*range(new)))
    return low.op("Tile", x, low.sizes([low.whole(one) for one in times]))


@lowers("aten.repeat_interleave.self_int")
def repeat_interleave(low: Lowering, node: fx.Node) -> Result:
    """Every slice along an axis so many times in a row."""
    source, times, axis = node.args[0], node.args[1], given(node, 2, "dim")
    assert isinstance(source, fx.Node) and isinstance(times, int) and axis is not None
    axis, rank = axis_of(source, axis), rank_of(source)
    wide = low.op("Unsqueeze", low.value(source), low.numbers(axis + 1))
    wide = low.op("Expand", wide, low.numbers(*(times if i == axis + 1 else 1 for i in range(rank + 1))))
    x = low.value(source)
    before = [low.size(x, i) for i in range(axis)]
    after = [low.size(x, i) for i in range(axis + 1, rank)]
    return low.reshape(wide, [*before, -1, *after])


@lowers("aten.cat", "aten.concat")
def cat(low: Lowering, node: fx.Node) -> Result:
    """One behind the other."""
    pieces: Any = node.args[0]
    dtype, axis = dtype_of(node), axis_of(node, given(node, 1, "dim", 0))
    return low.op("Concat", *(low.operand(piece, dtype) for piece in pieces), axis=axis)


@lowers("aten.stack")
def stack(low: Lowering, node: fx.Node) -> Result:
    """One behind the other along a new axis."""
    pieces: Any = node.args[0]
    dtype, axis = dtype_of(node), axis_of(node, given(node, 1, "dim", 0))
    wide = [low.op("Unsqueeze", low.operand(piece, dtype), low.numbers(axis)) for piece in pieces]
    return low.op("Concat", *wide, axis=axis)


@lowers("aten.slice.Tensor")
def slice_(low: Lowering, node: fx.Node) -> Result:
    """From one place to another."""
    source, axis = node.args[0], given(node, 1, "dim", 0)
    assert isinstance(source, fx.Node)
    start, end, step = given(node, 2, "start", 0) or 0, given(node, 3, "end"), given(node, 4, "step", 1)
    return low.slice(
        low.value(source), axis_of(source, axis), low.whole(start), END if end is None else low.whole(end), step
    )


@lowers("aten.select.int")
def select(low: Lowering, node: fx.Node) -> Result:
    """One slice along an axis, without that axis."""
    source, axis, at = node.args[:3]
    assert isinstance(source, fx.Node) and isinstance(axis, int) and isinstance(at, int)
    index = low.program.constant(np.array(at, dtype=np.int64))
    return low.op("Gather", low.value(source), index, axis=axis_of(source, axis))


@lowers("aten.split.Tensor", "aten.split_with_sizes", "aten.chunk", "aten.unbind.int")
def split(low: Lowering, node: fx.Node) -> Result:
    """Pieces, whose sizes are numbers."""
    source, op = node.args[0], op_name(node.target)
    assert isinstance(source, fx.Node)
    axis = axis_of(source, given(node, 1 if op == "aten.unbind.int" else 2, "dim", 0))
    pieces = node.meta["val"]
    if op == "aten.unbind.int":
        found = low.several("Split", low.value(source), results=len(pieces), axis=axis, num_outputs=len(pieces))
        return tuple(low.op("Squeeze", piece, low.numbers(axis)) for piece in found)
    sizes = low.numbers(*(piece.shape[axis] for piece in pieces))
    if fixed(source, axis) is None:
        raise unlowered(node, "along an axis whose size moves")
    return low.several("Split", low.value(source), sizes, results=len(pieces), axis=axis)


@lowers("py.getitem")
def getitem(low: Lowering, node: fx.Node) -> Result:
    """One of several values."""
    source, at = node.args
    assert isinstance(source, fx.Node) and isinstance(at, int)
    found = low.results[source]
    return found[at] if isinstance(found, tuple) else found


@lowers("aten.arange", "aten.arange.start", "aten.arange.start_step")
def arange(low: Lowering, node: fx.Node) -> Result:
    """Whole numbers from one to another."""
    bounds = [0, *node.args] if op_name(node.target) == "aten.arange" else list(node.args)
    start, end, step = [*bounds, 1][:3]
    numbers = [_scalar(low, bound) for bound in (start, end, step)]
    return low.cast(low.op("Range", *numbers), torch.int64, dtype_of(node))


def _scalar(low: Lowering, bound: Any) -> str:
    if isinstance(bound, fx.Node):
        return low.op("Squeeze", low.value(bound), low.numbers(0))
    return low.program.constant(np.array(bound, dtype=np.int64))


_FILL = {"zeros": 0, "ones": 1}


@lowers(*(f"aten.{new}{what}" for what in ("zeros", "ones", "full") for new in ("", "new_")))
def filled(low: Lowering, node: fx.Node) -> Result:
    """The same number everywhere."""
    op = op_name(node.target).removeprefix("aten.")
    at = 1 if op.startswith("new_") else 0
    what = op.removeprefix("new_")
    fill: Any = node.args[at + 1] if what == "full" else _FILL[what]
    shape: Any = node.args[at]
    value = low.operand(fill, dtype_of(node))
    return low.op("Expand", value, low.sizes([low.whole(size) for size in shape]))


@lowers("aten.zeros_like", "aten.ones_like", "aten.full_like")
def filled_like(low: Lowering, node: fx.Node) -> Result:
    """The same number everywhere, in the shape of another value."""
    op = op_name(node.target)
    fill: Any = node.args[1] if op == "aten.full_like" else int(op == "aten.ones_like")
    return low.op("Expand", low.operand(fill, dtype_of(node)), low.op("Shape", low.value(node.args[0])))


@lowers("aten.triu", "aten.tril")
def triangle(low: Lowering, node: fx.Node) -> Result:
    """What is above, or below, a diagonal."""
    upper, at = int(op_name(node.target) == "aten.triu"), given(node, 1, "diagonal", 0)
    return low.op("Trilu", low.value(node.args[0]), low.program.constant(np.array(at, dtype=np.int64)), upper=upper)


@lowers("aten.constant_pad_nd", "aten.pad")
def pad(low: Lowering, node: fx.Node) -> Result:
    """A constant around a value; sizes are given for the last axis first."""
    source, sizes = node.args[0], node.args[1]
    assert isinstance(source, fx.Node) and isinstance(sizes, (list, tuple))
    fill = given(node, 2, "value", 0) if op_name(node.target) == "aten.constant_pad_nd" else given(node, 3, "value", 0)
    axes = [rank_of(source) - 1 - i for i in range(len(sizes) // 2)]
    ends = [low.whole(size) for size in (*sizes[::2], *sizes[1::2])]
    return low.op("Pad", low.value(source), low.sizes(ends), low.number(fill or 0, dtype_of(node)), low.numbers(*axes))
