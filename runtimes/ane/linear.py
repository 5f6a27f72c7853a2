"""Linears as 1x1 convolutions, and embeddings, over weights that stay packed.

    fp16, int8   conv
    lut          conv, and with a scale a row mul behind it: products stay normal fp16 numbers (rule N11); so of vectors
    low-rank     mul, conv, conv: ``sum_k a_k * (Q (b_k * x))`` with the ranks on the last axis, so that any rank takes
                 three ops and reads Q once; of several tokens a reshape before and one after

A bias is added by the convolution, or after the scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from torch import fx

from graph.ops import op_name
from runtimes.ane.emitter import Array, Var, half
from runtimes.ane.lowering import Lowering, Result, Split, Value, lowers
from runtimes.ane.weights import Weight, constant

T = TypeVar("T")


@lowers("aten.linear", "qc.linear_lut_factored")
def linear(low: Lowering, node: fx.Node) -> Result:
    """``x W^T + b``; where the rows are more than one convolution may compute, in pieces."""
    weight = low.options.weights[node]
    bias_node = (
        node.args[2] if len(node.args) > 2 and op_name(node.target) == "aten.linear" else node.kwargs.get("bias")
    )
    bias = constant(low.graph, bias_node) if isinstance(bias_node, fx.Node) else None
    x = low.channels(low.value(node.args[0]))
    most = low.options.rows_per_head
    if weight.rows <= most or node.meta.get("custom", {}).get("role") != "head":
        return Value(_product(low, x, weight, slice(0, weight.rows), bias), (weight.rows,))
    parts = weight.pieces(most)
    found = [_product(low, x, weight, part, None if bias is None else bias[part]) for part in parts]
    return Split(tuple(Value(var, (int(var.shape[1]),)) for var in found))


@lowers("aten.embedding")
def embedding(low: Lowering, node: fx.Node) -> Value:
    """Rows of a table: (1, S, C), turned to (1, C, 1, S). It runs on the CPU."""
    weight, emit = low.options.weights[node], low.emit
    ids = emit.input("input_ids")
    rows = _gathered(low, weight, ids)
    turned = emit.op("transpose", x=rows, perm=[0, 2, 1])
    return Value(emit.op("expand_dims", x=turned, axes=[2]), (weight.columns,))


def _gathered(low: Lowering, weight: Weight, ids: Var) -> Var:
    """The rows of a weight, (1, S, columns)."""
    emit = low.emit

    def rows_of(table: Any) -> Var:
        return emit.op("gather", x=table, indices=ids, axis=0)

    if weight.kind == "fp16":
        return rows_of(_once(low, weight, "dense", weight.dense))
    if weight.kind == "int8":
        values, scale, lift = _once(low, weight, "integers", weight.integers)
        return _lowered(low, rows_of(emit.int8_weight(values, scale.reshape(-1, 1))), lift)
    found = rows_of(_looked_up(low, weight, slice(0, weight.rows), np.asarray))
    if weight.row_scale:
        scale = _once(low, weight, "scale", weight.scale)
        return emit.op("mul", x=found, y=rows_of(scale.reshape(-1, 1)))
    if weight.kind == "low-rank":
        a, b = _once(low, weight, "factors", weight.factors)
        return emit.op("mul", x=found, y=emit.op("matmul", x=rows_of(a), y=b))
    return found


def _product(low: Lowering, x: Var, weight: Weight, rows: slice, bias: Array | None) -> Var:
    """x: (1, I, 1, S)  ->  (1, rows, 1, S)."""
    if weight.kind == "fp16" or (weight.kind == "low-rank" and low.options.dense):
        return _conv(low, x, _kernel(_once(low, weight, "dense", weight.dense)[rows]), bias)
    if weight.kind == "int8":
        return _int8(low, x, weight, rows, bias)
    q = _looked_up(low, weight, rows, _kernel)
    if weight.kind == "low-rank":
        return _by_rank(low, x, q, weight, rows, bias)
    if not weight.row_scale:
        return _conv(low, x, q, bias)
    scale = _once(low, weight, "scale", weight.scale)[rows]
    scaled = low.emit.op("mul", x=_conv(low, x, q, None), y=scale.reshape(1, -1, 1, 1))
    return _plus(low, scaled, bias)


def _looked_up(low: Lowering, weight: Weight, rows: slice, shaped: Callable[[Array], Array]) -> Var:
    """Q of these rows; ``shaped`` gives the indices the axes that it shall have."""
    indices, levels = _once(low, weight, "table", weight.table)
    if weight.vector > 1:
        part = slice(rows.start // weight.vector, rows.stop // weight.vector)
        return low.emit.vector_weight(shaped(indices[part]), levels, weight.bits)
    return low.emit.lut_weight(shaped(indices[rows]), _levels_of(levels, weight, rows), weight.bits)


def _int8(low: Lowering, x: Var, weight: Weight, rows: slice, bias: Array | None) -> Var:
    """One constexpr; scales too small for fp16 are held larger, and what comes out is multiplied back."""
    values, scale, lift = _once(low, weight, "integers", weight.integers)
    q = low.emit.int8_weight(_kernel(values[rows]), scale[rows].reshape(-1, 1, 1, 1))
    if lift == 1:
        return _conv(low, x, q, bias)
    return _plus(low, _lowered(low, _conv(low, x, q, None), lift), bias)


def _lowered(low: Lowering, y: Var, lift: float) -> Var:
    return y if lift == 1 else low.emit.op("mul", x=y, y=half(1 / lift))


def _by_rank(low: Lowering, x: Var, q: Var, weight: Weight, rows: slice, bias: Array | None) -> Var:
    emit, tokens = low.emit, low.tokens
    a, b = _once(low, weight, "factors", weight.factors)
    wide = x if tokens == 1 else emit.op("reshape", x=x, shape=(1, weight.columns, tokens, 1))
    by_rank = emit.op("mul", x=wide, y=np.ascontiguousarray(b.T).reshape(1, weight.columns, 1, weight.rank))
    products = emit.op("conv", x=by_rank, weight=q, pad_type="valid")
    kernel = a[rows].reshape(-1, 1, 1, weight.rank)
    summed = emit.op("conv", x=products, weight=kernel, groups=int(kernel.shape[0]), pad_type="valid")
    y = summed if tokens == 1 else emit.op("reshape", x=summed, shape=(1, int(kernel.shape[0]), 1, tokens))
    return _plus(low, y, bias)


def _conv(low: Lowering, x: Var, kernel: Any, bias: Array | None) -> Var:
    given = {} if bias is None else {"bias": bias}
    return low.emit.op("conv", x=x, weight=kernel, pad_type="valid", **given)


def _plus(low: Lowering, y: Var, bias: Array | None) -> Var:
    return y if bias is None else low.emit.op("add", x=y, y=bias.reshape(1, -1, 1, 1))


def _kernel(matrix: Array) -> Array:
    """[out, in] as a kernel of a 1x1 convolution."""
    return matrix[:, :, None, None]


def _levels_of(levels: Array, weight: Weight, rows: slice) -> Array:
    """The tables of these rows."""
    if levels.shape[0] == 1:
        return levels
    share = weight.rows // levels.shape[0]
    return levels[rows.start // share : -(-rows.stop // share)]


def _once(low: Lowering, weight: Weight, form: str, load: Callable[[], T]) -> T:
    """A weight's values; read once for all functions of a part, which then hold the same array."""
    key = (weight.name, form)
    if key not in low.options.loaded:
        low.options.loaded[key] = load()
    found: T = low.options.loaded[key]
    return found
