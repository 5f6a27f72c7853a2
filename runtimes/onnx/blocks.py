"""What models are built of: linears, embeddings, norms, rotations, attention with its mask and its past."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from graph.ops import op_name
from graph.sites import node_name
from runtimes.onnx.lowering import Lowering, Result, dtype_of, fixed, given, lowers, rank_of, tensor_of
from runtimes.onnx.program import plain
from runtimes.onnx.weights import turned_weight

# -- products ---------------------------------------------------------------------------------------------------------


@lowers("aten.linear")
def linear(low: Lowering, node: fx.Node) -> Result:
    """``x W^T + bias``."""
    weight, bias = node.args[1], given(node, 2, "bias")
    assert isinstance(weight, fx.Node)
    y = low.op("MatMul", low.value(node.args[0]), turned_weight(low, weight))
    return y if bias is None else low.op("Add", y, low.operand(bias, dtype_of(node)))


@lowers("aten.embedding")
def embedding(low: Lowering, node: fx.Node) -> Result:
    """Rows of a table."""
    return low.op("Gather", low.value(node.args[0]), low.value(node.args[1]), axis=0)


@lowers("aten.matmul", "aten.mm", "aten.bmm")
def matmul(low: Lowering, node: fx.Node) -> Result:
    """The product of two values."""
    return low.op("MatMul", low.value(node.args[0]), low.value(node.args[1]))


@lowers("aten.addmm", "aten.baddbmm")
def add_product(low: Lowering, node: fx.Node) -> Result:
    """``beta x + alpha a b``."""
    dtype = dtype_of(node)
    product = low.op("MatMul", low.value(node.args[1]), low.value(node.args[2]))
    other = low.value(node.args[0])
    for name in ("beta", "alpha"):
        factor = node.kwargs.get(name, 1)
        if factor != 1 and name == "beta":
            other = low.op("Mul", other, low.operand(factor, dtype))
        elif factor != 1:
            product = low.op("Mul", product, low.operand(factor, dtype))
    return low.op("Add", product, other)


@lowers("qc.lora", "qc.lora_in_place")
def lora(low: Lowering, node: fx.Node) -> Result:
    """``y + s B A x``, A and B rounded to the dtype of y."""
    from graph.lora import scale_of

    y, x, a, b, alpha = node.args[:5]
    assert isinstance(a, fx.Node) and isinstance(b, fx.Node)
    dtype, rank = dtype_of(node), int(tensor_of(a).shape[0])
    scale = scale_of(float(alpha), rank, bool(given(node, 5, "rslora", False)))  # type: ignore[arg-type]
    inner = low.op("MatMul", low.operand(x, dtype), low.cast(turned_weight(low, a), dtype_of(a), dtype))
    outer = low.op("MatMul", inner, low.cast(turned_weight(low, b), dtype_of(b), dtype))
    return low.op("Add", low.value(y), low.op("Mul", outer, low.number(scale, dtype)))


# -- norms ------------------------------------------------------------------------------------------------------------


@lowers("aten.layer_norm")
def layer_norm(low: Lowering, node: fx.Node) -> Result:
    """Statistics in fp32."""
    sizes: Any = node.args[1]
    dtype, (weight, bias) = dtype_of(node), (given(node, 2, "weight"), given(node, 3, "bias"))
    ones = np.ones(tuple(int(size) for size in sizes), dtype=np.float32)
    scale = low.cast(low.program.constant(ones), torch.float32, dtype) if weight is None else low.operand(weight, dtype)
    more = [] if bias is None else [low.operand(bias, dtype)]
    epsilon = float(given(node, 4, "eps", 1e-5))
    return low.op("LayerNormalization", low.value(node.args[0]), scale, *more, axis=-len(sizes), epsilon=epsilon)


@lowers("qc.rms_norm")
def rms_norm(low: Lowering, node: fx.Node) -> Result:
    """Statistics in fp32; the weight multiplies before or after the result is rounded."""
    source, weight, epsilon = node.args[:3]
    assert isinstance(source, fx.Node) and isinstance(epsilon, float)
    unit, wide = given(node, 3, "unit_offset", False), given(node, 4, "scale_in_fp32", False)
    dtype, inner = dtype_of(source), torch.float32 if unit or wide else dtype_of(source)
    x = low.cast(low.value(source), dtype, inner)
    size = int(tensor_of(source).shape[-1])
    if weight is None:
        scale = low.cast(low.program.constant(np.ones(size, dtype=np.float32)), torch.float32, inner)
    else:
        assert isinstance(weight, fx.Node)
        scale = _offset(low, weight) if unit else low.operand(weight, inner)
    y = low.op("RMSNormalization", x, scale, epsilon=epsilon)
    return low.cast(y, inner, dtype_of(node))


def _offset(low: Lowering, weight: fx.Node) -> str:
    """``1 + weight``, in fp32."""
    if not low.is_stored(weight):
        return low.op("Add", low.operand(weight, torch.float32), low.number(1.0, torch.float32))
    name, shape = node_name(weight), tuple(tensor_of(weight).shape)
    return low.program.hold(f"{name}.plus_one", "FLOAT", shape, lambda: plain(low.evaluate(weight).float() + 1.0, name))


# -- attention --------------------------------------------------------------------------------------------------------


@lowers("qc.rope")
def rope(low: Lowering, node: fx.Node) -> Result:
    """Turn the first columns by their angles."""
    source, cos, sin = node.args[:3]
    assert isinstance(source, fx.Node) and isinstance(cos, fx.Node) and isinstance(sin, fx.Node)
    x, width, turned = low.value(source), int(tensor_of(source).shape[-1]), int(tensor_of(cos).shape[-1])
    wide = torch.promote_types(dtype_of(source), dtype_of(cos))
    tables = [low.op("Unsqueeze", low.operand(table, wide), low.numbers(1)) for table in (cos, sin)]
    rest = ""
    if turned < width:
        x, rest = low.several("Split", x, low.numbers(turned, width - turned), results=2, axis=-1)
    x = low.cast(x, dtype_of(source), wide)
    half = _interleaved(low, x, turned) if given(node, 3, "interleaved", False) else _halves(low, x, turned)
    y = low.op("Add", low.op("Mul", x, tables[0]), low.op("Mul", half, tables[1]))
    y = low.cast(y, wide, dtype_of(source))
    return low.op("Concat", y, rest, axis=-1) if rest else y


def _halves(low: Lowering, x: str, width: int) -> str:
    """(a, b) -> (-b, a)."""
    first, second = low.several("Split", x, low.numbers(width // 2, width // 2), results=2, axis=-1)
    return low.op("Concat", low.op("Neg", second), first, axis=-1)


def _interleaved(low: Lowering, x: str, width: int) -> str:
    """(a, b, c, d) -> (-b, a, -d, c)."""
    pairs = low.reshape(x, [0, 0, 0, width // 2, 2])
    first, second = low.several("Split", pairs, results=2, axis=-1, num_outputs=2)
    return low.reshape(low.op("Concat", low.op("Neg", second), first, axis=-1), [0, 0, 0, width])


@lowers("qc.attention_mask", "qc.cached_attention_mask")
def attention_mask(low: Lowering, node: fx.Node) -> Result:
    """True where a query sees a key: not padding, near, of its own document."""
    cached = op_name(node.target) == "qc.cached_attention_mask"
    source, more = node.args[0], node.args[2 if cached else 1 :]
    kind, window = [*more, *("causal", None)[len(more) :]]
    assert isinstance(source, fx.Node)
    queries = keys = low.value(source)
    start = low.numbers(0)
    if cached:
        past = low.operand(node.args[1], dtype_of(source))
        keys, start = low.op("Concat", past, queries, axis=1), low.size(past, 1)
    end = low.op("Add", start, low.size(queries, 1))
    near = _near(low, start, end, kind, window)
    of_keys = low.op("Unsqueeze", keys, low.numbers(1, 2))
    seen = low.cast(of_keys, dtype_of(source), torch.bool)
    seen = low.op("And", near, seen) if near else seen
    if dtype_of(source) is torch.bool:
        return seen
    of_queries = low.op("Unsqueeze", queries, low.numbers(1, 3))
    same = low.op("Equal", of_queries, of_keys)
    return low.op("And", seen, low.op("Or", same, low.op("Equal", of_queries, low.number(0, dtype_of(source)))))


def _near(low: Lowering, start: str, end: str, kind: Any, window: Any) -> str:
    """Of keys 0 … end and queries start … end, which are in reach: [queries, keys]; nothing where all are."""
    if kind != "causal" and window is None:
        return ""
    zero, one = (low.program.constant(np.array(n, dtype=np.int64)) for n in (0, 1))
    last = low.op("Squeeze", end, low.numbers(0))
    k = low.op("Unsqueeze", low.op("Range", zero, last, one), low.numbers(0))
    q = low.op("Unsqueeze", low.op("Range", low.op("Squeeze", start, low.numbers(0)), last, one), low.numbers(1))
    if kind != "causal":
        return low.op("LessOrEqual", low.op("Abs", low.op("Sub", k, q)), low.numbers(int(window)))
    behind = low.op("LessOrEqual", k, q)
    if window is None:
        return behind
    return low.op("And", behind, low.op("Greater", k, low.op("Sub", q, low.numbers(int(window)))))


@lowers("qc.attention")
def attention(low: Lowering, node: fx.Node) -> Result:
    """Scaled dot-product attention, [batch, length, heads, d]."""
    scale, causal, softcap = given(node, 4, "scale"), given(node, 5, "causal", True), given(node, 6, "softcap")
    y = _attend(low, node.args[:3], given(node, 3, "mask"), scale, bool(causal), softcap)
    return low.transpose(y, (0, 2, 1, 3))


@lowers("aten.scaled_dot_product_attention")
def sdpa(low: Lowering, node: fx.Node) -> Result:
    """The same as torch has it, [batch, heads, length, d]."""
    causal, scale = given(node, 5, "is_causal", False), given(node, 6, "scale")
    return _attend(low, node.args[:3], given(node, 3, "attn_mask"), scale, bool(causal), None)


def _attend(low: Lowering, qkv: Any, mask: Any, scale: Any, causal: bool, softcap: Any) -> str:
    """``softmax(scale q k^T + mask) v``, the queries of a group of heads beside each other.

    A key that a query does not see scores the lowest number there is, not minus infinity: so what padding sees
    nothing of stays a number.
    """
    q, k, v = qkv
    dtype, groups = dtype_of(q), int(tensor_of(q).shape[1]) // int(tensor_of(k).shape[1])
    factor = tensor_of(q).shape[-1] ** -0.5 if scale is None else float(scale)
    queries = low.op("Mul", low.value(q), low.number(factor, dtype))
    keys, values = low.value(k), low.value(v)
    last = (0, 1, 3, 2)
    if groups > 1:
        kv = int(tensor_of(k).shape[1])
        queries = low.reshape(queries, [0, kv, groups, -1, int(tensor_of(q).shape[-1])])
        keys, values = (low.op("Unsqueeze", value, low.numbers(2)) for value in (keys, values))
        last = (0, 1, 2, 4, 3)  # type: ignore[assignment]
    scores = low.op("MatMul", queries, low.transpose(keys, last))
    if softcap is not None:
        cap = low.number(float(softcap), dtype)
        scores = low.op("Mul", low.op("Tanh", low.op("Div", scores, cap)), cap)
    scores = _masked(low, scores, (q, k), mask, causal, groups)
    found = low.op("MatMul", low.op("Softmax", scores, axis=-1), values)
    if groups > 1:
        found = low.reshape(found, [0, int(tensor_of(q).shape[1]), -1, int(tensor_of(v).shape[-1])])
    return found


def _masked(low: Lowering, scores: str, qk: Any, mask: Any, causal: bool, groups: int) -> str:
    q, k = qk
    dtype = dtype_of(q)
    lowest = low.number(torch.finfo(dtype).min, dtype)
    if mask is None:
        if not causal:
            return scores
        end = low.size(low.value(k), 2)
        start = low.op("Sub", end, low.size(low.value(q), 2)) if fixed(q, 2) is None else low.numbers(0)
        return low.op("Where", _near(low, start, end, "causal", None), scores, lowest)
    assert isinstance(mask, fx.Node)
    hidden = low.value(mask)
    if groups > 1 and rank_of(mask) == 4:
        if fixed(mask, 1) == 1:
            hidden = low.op("Unsqueeze", hidden, low.numbers(2))
        else:
            kv = int(tensor_of(k).shape[1])
            hidden = low.reshape(hidden, [0, kv, groups, low.size(hidden, 2), low.size(hidden, 3)])
    if dtype_of(mask) is torch.bool:
        return low.op("Where", hidden, scores, lowest)
    return low.op("Add", scores, low.cast(hidden, dtype_of(mask), dtype))


# -- the past ---------------------------------------------------------------------------------------------------------


@lowers("qc.update_cache")
def update_cache(low: Lowering, node: fx.Node) -> Result:
    """What was there, and the new behind it."""
    new, past = node.args[:2]
    return low.op("Concat", low.value(past), low.value(new), axis=2)


@lowers("qc.positions")
def positions(low: Lowering, node: fx.Node) -> Result:
    """The positions of new tokens behind those of the past, padding counted: [1, T]."""
    start = low.size(low.value(node.args[1]), 1)
    end = low.op("Add", start, low.size(low.value(node.args[0]), 1))
    first, last = (low.op("Squeeze", number, low.numbers(0)) for number in (start, end))
    return low.op(
        "Unsqueeze", low.op("Range", first, last, low.program.constant(np.array(1, dtype=np.int64))), low.numbers(0)
    )


@lowers("qc.running_sum")
def running_sum(low: Lowering, node: fx.Node) -> Result:
    """Sums of the mask up to each new token, those of the past included."""
    source, past = node.args[:2]
    at = low.program.constant(np.array(1, dtype=np.int64))
    sums = low.op("CumSum", low.operand(source, torch.int64), at)
    return low.op("Add", sums, low.op("ReduceSum", low.operand(past, torch.int64), low.numbers(1), keepdims=1))
