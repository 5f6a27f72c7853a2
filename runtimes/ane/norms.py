"""Norms, in forms that never square a value of the residual stream in fp16 (rule N3)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import fx

from runtimes.ane.emitter import Array, half
from runtimes.ane.layout import refuse
from runtimes.ane.lowering import Lowering, Value, lowers
from runtimes.ane.weights import constant

SMALLEST = 2.0**-24
"""The smallest fp16 number above 0; an epsilon that rounds to nothing would divide by it."""


@lowers("qc.rms_norm")
def rms_norm(low: Lowering, node: fx.Node) -> Value:
    """The first half of ``layer_norm([x, -x])``: its mean is 0, so its variance is the mean square of x."""
    source, weight, eps, unit_offset, _ = (*node.args, *(False, False))[:5]
    value, emit = low.value(source), low.emit
    var, axis = low.natural(value)
    both = emit.op("concat", values=[var, emit.op("mul", x=var, y=half(-1))], axis=axis)
    normed = emit.op("layer_norm", x=both, axes=[axis], epsilon=epsilon(eps))
    first = emit.op("slice_by_index", x=normed, begin=[0, 0, 0, 0], end=[int(n) for n in var.shape])
    gain = _gain(low, node, weight, bool(unit_offset))
    if gain is None:
        return Value(first, value.features)
    shape = (1, -1, 1, 1) if axis == 1 else (1, 1, -1, 1)
    return Value(emit.op("mul", x=first, y=gain.reshape(shape)), value.features)


def _gain(low: Lowering, node: fx.Node, weight: Any, unit_offset: bool) -> Array | None:
    """What the normed value is multiplied by: the weight, times the scale of the attention that it feeds."""
    extra = low.options.gains.get(node, 1.0)
    if weight is None:
        return None if extra == 1.0 else np.full(1, extra, np.float16)
    found = constant(low.graph, weight).astype(np.float32)
    gain: Array = ((1 + found if unit_offset else found) * np.float32(extra)).astype(np.float16)
    return gain


@lowers("aten.layer_norm")
def layer_norm(low: Lowering, node: fx.Node) -> Value:
    """Over the last feature."""
    given: list[Any] = [*node.args, *[None] * 5][:6]
    source, shape, weight, bias, eps, _ = given
    value = low.value(source)
    if len(shape) != 1:
        raise refuse(node, f"norms over {len(shape)} dimensions")
    var, axis = low.natural(value)
    affine = {"gamma": weight, "beta": bias}
    stored = {key: constant(low.graph, arg) for key, arg in affine.items() if isinstance(arg, fx.Node)}
    made = low.emit.op("layer_norm", x=var, axes=[axis], epsilon=epsilon(1e-5 if eps is None else eps), **stored)
    return Value(made, value.features)


def epsilon(eps: Any) -> np.float16:
    """As an fp16 number that is not 0."""
    return half(max(float(eps), SMALLEST)) if math.isfinite(float(eps)) else half(SMALLEST)
