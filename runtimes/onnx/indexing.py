"""Ops that look values up, and those that make one number of many along an axis."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import fx

from graph.ops import op_name
from runtimes.onnx.lowering import Lowering, Result, axis_of, dtype_of, given, lowers, rank_of, tensor_of, unlowered

# -- looking up -------------------------------------------------------------------------------------------------------


@lowers("aten.gather")
def gather(low: Lowering, node: fx.Node) -> Result:
    """Values at places along an axis."""
    source, axis, index = node.args[:3]
    assert isinstance(source, fx.Node) and isinstance(axis, int)
    return low.op("GatherElements", low.value(source), low.value(index), axis=axis_of(source, axis))


@lowers("aten.index_select")
def index_select(low: Lowering, node: fx.Node) -> Result:
    """Slices at places along an axis."""
    source, axis, index = node.args[:3]
    assert isinstance(source, fx.Node) and isinstance(axis, int)
    return low.op("Gather", low.value(source), low.value(index), axis=axis_of(source, axis))


@lowers("aten.index.Tensor")
def index(low: Lowering, node: fx.Node) -> Result:
    """Values at places that tensors give, along the first axes; masks select no values here."""
    source, places = node.args[0], node.args[1]
    assert isinstance(source, fx.Node) and isinstance(places, (list, tuple))
    used = [place for place in places if place is not None]
    if any(dtype_of(place) is torch.bool for place in used):
        raise unlowered(node, "by a mask")
    if len(used) == 1:
        axis = next(i for i, place in enumerate(places) if place is not None)
        return low.op("Gather", low.value(source), low.operand(used[0], torch.int64), axis=axis)
    if used != list(places):
        raise unlowered(node, "that takes places behind a whole axis")
    return low.op("GatherND", low.value(source), _together(low, used))


def _together(low: Lowering, places: Sequence[fx.Node]) -> str:
    """Places along several axes, side by side: [..., axes]."""
    values = [low.operand(place, torch.int64) for place in places]
    total = values[0]
    for value in values[1:]:
        total = low.op("Add", total, value)
    shape = low.op("Shape", total)
    wide = [low.op("Unsqueeze", low.op("Expand", value, shape), low.numbers(-1)) for value in values]
    return low.op("Concat", *wide, axis=-1)


# -- along an axis ----------------------------------------------------------------------------------------------------

_REDUCE = {"aten.mean.dim": "ReduceMean", "aten.sum.dim_IntList": "ReduceSum", "aten.amax": "ReduceMax",
           "aten.amin": "ReduceMin"}  # fmt: skip


@lowers(*_REDUCE)
def reduce(low: Lowering, node: fx.Node) -> Result:
    """One number of many."""
    source, axes = node.args[0], given(node, 1, "dim")
    assert isinstance(source, fx.Node)
    listed = axes if isinstance(axes, (list, tuple)) else range(rank_of(source)) if axes is None else [axes]
    keep = int(bool(given(node, 2, "keepdim", False)))
    x = low.operand(source, dtype_of(node))
    wanted = low.numbers(*(axis_of(source, int(axis)) for axis in listed))
    return low.op(_REDUCE[op_name(node.target)], x, wanted, keepdims=keep)


@lowers("aten.cumsum")
def cumsum(low: Lowering, node: fx.Node) -> Result:
    """Sums up to each place."""
    source, axis = node.args[0], given(node, 1, "dim")
    assert isinstance(source, fx.Node)
    at = low.program.constant(np.array(axis_of(source, axis), dtype=np.int64))
    return low.op("CumSum", low.operand(source, dtype_of(node)), at)


@lowers("aten.softmax.int", "aten._softmax", "aten.log_softmax.int")
def softmax(low: Lowering, node: fx.Node) -> Result:
    """In the dtype of the result."""
    source, axis = node.args[0], given(node, 1, "dim")
    assert isinstance(source, fx.Node)
    kind = "LogSoftmax" if op_name(node.target) == "aten.log_softmax.int" else "Softmax"
    return low.op(kind, low.operand(source, tensor_of(node).dtype), axis=axis_of(source, axis))
