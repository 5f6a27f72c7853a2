"""Attention spelled out, with grouped queries as more queries of one head: keys and values are never repeated.

Of one token: (1, KV, G, D) times keys (1, KV, T, D). Of several, queries are rows: (1, H, S, D) as (1, KV, G*S, D).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import fx

from runtimes.ane.emitter import Var, half
from runtimes.ane.host import over_pairs
from runtimes.ane.layout import cut, refuse
from runtimes.ane.lowering import Lowering, Scores, Value, lowers


@lowers("qc.rope")
def rope(low: Lowering, node: fx.Node) -> Value:
    """``x cos + rotate(x) sin`` along axis 2, the features of a head (rule N6)."""
    source, cos, sin, interleaved = (*node.args, False)[:4]
    value, emit = low.value(source), low.emit
    *outer, size = value.features
    turned = int(cos.meta["val"].shape[-1])  # type: ignore[union-attr]
    x = cut(low, value, len(outer), 0, turned)
    var = low.heads(x)
    rotated = _interleaved(low, var) if interleaved else _halves(low, x)
    turn = _signed(low, low.options.ropes[sin], turned, bool(interleaved))  # type: ignore[index]
    kept = emit.op("mul", x=var, y=emit.input(low.options.ropes[cos]))  # type: ignore[index]
    made = emit.op("add", x=kept, y=emit.op("mul", x=rotated, y=turn))
    if turned == size:
        return Value(made, value.features)
    rest = low.heads(cut(low, value, len(outer), turned, size))
    return Value(emit.op("concat", values=[made, rest], axis=2), value.features)


def _signed(low: Lowering, name: str, size: int, interleaved: bool) -> Var:
    """The sines with the sign of what they are multiplied with, once for all blocks."""
    if name not in low.shared:
        signs = np.ones(size, np.float16)
        signs[slice(0, None, 2) if interleaved else slice(size // 2)] = -1
        low.shared[name] = low.emit.op("mul", x=low.emit.input(name), y=signs.reshape(1, 1, size, 1))
    return low.shared[name]


def _halves(low: Lowering, x: Value) -> Var:
    """[second half, first half]."""
    *outer, size = x.features
    first, second = (low.heads(cut(low, x, len(outer), start, start + size // 2)) for start in (0, size // 2))
    return low.emit.op("concat", values=[second, first], axis=2)


def _interleaved(low: Lowering, x: Var) -> Var:
    """Odd and even values in each other's places."""
    emit, shape = low.emit, tuple(int(n) for n in x.shape)
    pairs = (1, shape[1] * shape[2] // 2, 2, shape[3])
    paired = emit.op("reshape", x=x, shape=pairs)
    even, odd = (
        emit.op("slice_by_index", x=paired, begin=[0, 0, i, 0], end=[1, pairs[1], i + 1, pairs[3]]) for i in (0, 1)
    )
    return emit.op("reshape", x=emit.op("concat", values=[odd, even], axis=2), shape=shape)


@lowers("qc.attention")
def attention(low: Lowering, node: fx.Node) -> Value:
    """softmax(q k + mask) v."""
    given: list[Any] = [*node.args, *[None] * 4][:7]
    q, k, v, mask, scale, _, softcap = given
    queries, keys, values = low.value(q), low.value(k), low.value(v)
    heads, size = queries.features
    q_rows = grouped(low, queries, keys.features[0])
    if node not in low.options.scaled:
        q_rows = low.emit.op("mul", x=q_rows, y=half(size**-0.5 if scale is None else scale))
    if low.cache is None:
        scores = low.emit.op("matmul", x=q_rows, y=low.heads(keys))
        weights = _softmax(low, scores, heads, mask, softcap)
        mixed = low.emit.op("matmul", x=weights, y=low.heads(values), transpose_y=True)
    else:
        all_keys, all_values = low.cache.update(_rows(low, keys), _rows(low, values))
        low.emit.at(str(node.meta["custom"]["site"]))
        scores = low.emit.op("matmul", x=q_rows, y=all_keys, transpose_y=True)
        mixed = low.emit.op("matmul", x=_softmax(low, scores, heads, mask, softcap), y=all_values)
    return ungrouped(low, mixed, heads, values.features[-1])


def _rows(low: Lowering, value: Value) -> Var:
    """Tokens before features, (1, H, S, D)."""
    heads, size = value.features
    if low.tokens == 1:
        return low.shaped(value, (1, heads, 1, size))
    return low.emit.op("transpose", x=low.heads(value), perm=[0, 1, 3, 2])


def grouped(low: Lowering, value: Value, kv_heads: int) -> Var:
    """Queries of a group one behind the other, (1, KV, G*S, D)."""
    heads, size = value.features
    shape = (1, kv_heads, heads // kv_heads * low.tokens, size)
    return low.shaped(value, shape) if low.tokens == 1 else low.shaped(Value(_rows(low, value), ()), shape)


def _softmax(low: Lowering, scores: Var, heads: int, mask: Any, softcap: Any) -> Var:
    """The weights of all keys, in the shape of the scores (1, KV, G*S, T)."""
    emit, shape = low.emit, tuple(int(n) for n in scores.shape)
    if softcap is not None:
        capped = emit.op("tanh", x=emit.op("mul", x=scores, y=half(1 / softcap)))
        scores = emit.op("mul", x=capped, y=half(softcap))
    bias = low.options.biases.get(mask)
    by_head = (1, heads, low.tokens, shape[3])
    apart = by_head if low.tokens > 1 or (bias is not None and bias.shape[1] > 1) else shape
    scores = masked(low, low.shaped(Value(scores, ()), apart), mask)
    return low.shaped(Value(emit.op("softmax", x=scores, axis=-1), ()), shape)


def masked(low: Lowering, scores: Var, mask: Any) -> Var:
    """Scores with what a mask adds to them: the input that hides keys, the constant that does not."""
    if mask in low.options.masks:
        scores = low.emit.op("add", x=scores, y=low.emit.input(low.options.masks[mask]))
    if mask in low.options.biases:
        scores = low.emit.op("add", x=scores, y=low.options.biases[mask])
    return scores


@lowers("aten.matmul", "aten.bmm")
def product(low: Lowering, node: fx.Node) -> Value:
    """An encoder's attention spelled out: queries times keys, or weights times values."""
    a, b = (low.value(arg) for arg in node.args[:2])
    if isinstance(a, Scores):
        mixed = low.emit.op("matmul", x=a.var, y=low.heads(b), transpose_y=True)
        turned = low.emit.op("transpose", x=mixed, perm=[0, 1, 3, 2])
        return Value(turned, b.features)
    if not over_pairs(node) or isinstance(b, Scores):
        raise refuse(node, "multiplies what is not queries, keys, weights and values")
    return Scores(low.emit.op("matmul", x=_rows(low, a), y=low.heads(b)), a.features[:-1])


@lowers("aten.softmax.int", "aten._softmax")
def softmax(low: Lowering, node: fx.Node) -> Value:
    """Over all keys."""
    scores = low.value(node.args[0])
    if not isinstance(scores, Scores) or int(str(node.args[1])) not in (-1, 3):
        raise refuse(node, "is over something else than keys")
    return Scores(low.emit.op("softmax", x=scores.var, axis=-1), scores.features)


def ungrouped(low: Lowering, mixed: Var, heads: int, size: int) -> Value:
    """Features before tokens again."""
    if low.tokens == 1:
        return Value(mixed, (heads, size))
    rows = low.shaped(Value(mixed, ()), (1, heads, low.tokens, size))
    assert math.prod(rows.shape) == math.prod(mixed.shape)
    return Value(low.emit.op("transpose", x=rows, perm=[0, 1, 3, 2]), (heads, size))
