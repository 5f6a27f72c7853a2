"""The ops of a graph: torch's aten ops, and the few that torch lacks.

An op of ours is a plain function over tensors, kept whole as one node. So it runs, differentiates, and runs on
``meta`` and fake tensors by construction. ``OPS`` is the allow-list: a graph on disk may name these and functional
aten ops, nothing else.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._ops import OpOverload

F = TypeVar("F", bound=Callable[..., Any])

OPS: dict[str, Callable[..., Any]] = {}
"""``qc.rms_norm`` -> the function."""

OP_MODULES = (
    "graph.formats", "graph.lora", "graph.cache", "graph.memory", "graph.staged", "graph.chunks", "graph.degraded",
    "graph.fp8_linear", "graph.unpadded",
)  # fmt: skip
"""The modules that register further ops; they are imported when an op is asked for that is not there yet."""

_BUILTIN: dict[str, Callable[..., Any]] = {
    f"py.{f.__name__}": f
    for f in (operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg, operator.getitem,
              operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.truediv)
} | {"py.sym_max": torch.sym_max, "py.sym_min": torch.sym_min, "py.sym_not": torch.sym_not,
     "py.sym_float": torch.sym_float, "py.sym_int": torch.sym_int, "py.sym_ite": torch.sym_ite,
     "py.sym_sqrt": torch.sym_sqrt, "py.math_floor": math.floor,
     "py.math_ceil": math.ceil, "py.pow": operator.pow}  # fmt: skip


def op(function: F) -> F:
    """Make ``function`` an op of the graph under the name ``qc.<its name>``."""
    name = f"qc.{function.__name__}"
    assert name not in OPS, f"two ops are called {name}"
    OPS[name] = function
    return function


def op_name(target: Any) -> str:
    """``aten.linear.default`` -> ``aten.linear``; other overloads stay: ``aten.add.Tensor``; ours: ``qc.rms_norm``."""
    if isinstance(target, OpOverload):
        return _overload_name(target)
    for table, prefix in ((OPS, "qc."), (_BUILTIN, "py.")):
        name = prefix + getattr(target, "__name__", "")
        if table.get(name) is target:
            return name
    for name, function in _BUILTIN.items():
        if function is target:
            return name
    raise AssertionError(f"{target} is not an op of the graph")


@cache
def _overload_name(target: OpOverload) -> str:
    return str(target).removesuffix(".default")


def find_op(name: str) -> Callable[..., Any] | None:
    """The op called ``name``, or None where no op allowed in a graph is called so."""
    if name.startswith("qc."):
        for module in OP_MODULES:
            if name not in OPS:
                import_module(module)
        return OPS.get(name)
    if name in _BUILTIN:
        return _BUILTIN[name]
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    if namespace != "aten" or not hasattr(torch.ops.aten, packet):
        return None
    found = getattr(getattr(torch.ops.aten, packet), overload or "default", None)
    return found if isinstance(found, OpOverload) and _is_pure(found) else None


def _is_pure(overload: OpOverload) -> bool:
    """Whether an aten op does nothing but compute: ``aten.save`` and ``aten.from_file`` are called functional too."""
    schema = overload._schema
    takes, gives = [str(a.type) for a in schema.arguments], [str(r.type) for r in schema.returns]
    from_tensors = any("Tensor" in kind for kind in takes)
    creates = "Tensor" in gives and "str" not in takes
    return not schema.is_mutable and bool(gives) and (from_tensors or creates)


class _RmsNorm(torch.autograd.Function):
    """Keeps the input and one number a row for the backward, not the fp32 copies that autograd would keep."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool, scale_in_fp32: bool
    ) -> Tensor:
        y, rstd = _rms_norm(x, weight, eps, unit_offset, scale_in_fp32)
        ctx.save_for_backward(x, weight, rstd)
        ctx.unit_offset = unit_offset
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, weight, rstd = ctx.saved_tensors
        normed = x.float() * rstd
        g = grad.float()
        d_weight = None
        if weight is not None:
            if ctx.needs_input_grad[1]:
                d_weight = (g * normed).reshape(-1, weight.shape[-1]).sum(0).to(weight.dtype)
            g = g * (1.0 + weight.float() if ctx.unit_offset else weight.float())
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = torch.addcmul(g, normed, (g * normed).mean(-1, keepdim=True), value=-1).mul_(rstd).to(x.dtype)
        return d_x, d_weight, None, None, None


def _rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool, scale_in_fp32: bool
) -> tuple[Tensor, Tensor]:
    x32 = x.to(torch.float32)
    rstd = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    h = x32 * rstd
    if weight is None:
        return h.to(x.dtype), rstd
    if unit_offset:
        return (h * (1.0 + weight.float())).to(x.dtype), rstd
    return (weight * h).to(x.dtype) if scale_in_fp32 else weight * h.to(x.dtype), rstd


@op
def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool = False, scale_in_fp32: bool = False
) -> Tensor:
    """Root-mean-square norm over the last dimension (arXiv:1910.07467), statistics in fp32.

    x: [..., d]    weight: [d]  ->  [..., d]

    ``unit_offset`` multiplies by ``1 + weight``; ``scale_in_fp32`` multiplies before the cast back to ``x``'s dtype.
    """
    if torch.is_grad_enabled() and (x.requires_grad or (weight is not None and weight.requires_grad)):
        return _RmsNorm.apply(x, weight, eps, unit_offset, scale_in_fp32)
    return _rms_norm(x, weight, eps, unit_offset, scale_in_fp32)[0]


@op
def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary position embedding (arXiv:2104.09864).

    x: [batch, heads, length, d]    cos, sin: [batch or 1, length, r], r <= d  ->  like x

    The first ``r`` columns turn, the others pass. Pairs are ``(i, i + r/2)``, or ``(2i, 2i + 1)`` if ``interleaved``.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if torch.is_grad_enabled() and x.requires_grad and not (cos.requires_grad or sin.requires_grad):
        turned: Tensor = _Rope.apply(x, cos, sin, interleaved)
        return turned
    return _rope(x, cos, sin, interleaved)


class _Rope(torch.autograd.Function):
    """Its backward turns back, in three passes over the gradient; what autograd would make of it takes nine."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved, ctx.dtype = interleaved, x.dtype
        return _rope(x, cos, sin, interleaved)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        r = cos.shape[-1]
        g = grad[..., :r].to(cos.dtype)
        d_x = g * cos
        first, second = (slice(0, None, 2), slice(1, None, 2)) if ctx.interleaved else (slice(r // 2), slice(r // 2, r))
        d_x[..., first].addcmul_(g[..., second], sin[..., second])
        d_x[..., second].addcmul_(g[..., first], sin[..., first], value=-1)
        d_x = d_x.to(ctx.dtype)
        return (d_x if r == grad.shape[-1] else torch.cat((d_x, grad[..., r:]), -1)), None, None, None


def _rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """``rope`` with a dimension for the heads in both tables."""
    r = cos.shape[-1]
    turned, passed = (x, None) if r == x.shape[-1] else (x[..., :r], x[..., r:])
    if interleaved:
        half = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    else:
        half = torch.cat((-turned[..., r // 2 :], turned[..., : r // 2]), dim=-1)
    y = ((turned * cos) + (half * sin)).to(x.dtype)
    return y if passed is None else torch.cat((y, passed), dim=-1)


@op
def attention_mask(attention_mask: Tensor, kind: str = "causal", window: int | None = None) -> Tensor | None:
    """Which key each query may look at: True where it may.

    attention_mask: int or bool [batch, length], 0 is padding  ->  bool [batch, 1, length, length]

    Numbers above 1 are document numbers: in a packed row a query sees keys of its own document only. With
    ``kind="causal"`` keys after the query are hidden, with ``window`` those ``window`` or more before it too (both
    sides for ``kind="bidirectional"``). None where nothing but the future is hidden, so that attention takes its
    fast path; never None for a traced or ``meta`` tensor.
    """
    keys = attention_mask
    batch, length = keys.shape
    if window is None and _readable(keys) and bool((keys == 1).all()):
        return None
    i = torch.arange(length, device=keys.device)
    q, k = i[:, None], i[None, :]
    if kind == "causal":
        near = k <= q if window is None else (k <= q) & (k > q - window)
    else:
        near = torch.ones_like(k <= q) if window is None else (k - q).abs() <= window
    seen = near[None, None] & keys.bool()[:, None, None, :]
    if keys.dtype == torch.bool:
        return seen.expand(batch, 1, length, length)
    same = (keys[:, None, :, None] == keys[:, None, None, :]) | (keys[:, None, :, None] == 0)
    return seen & same


def _readable(x: Tensor) -> bool:
    return x.device.type == "cpu" and type(x) in (Tensor, torch.nn.Parameter)


@op
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None = None,
    causal: bool = True,
    softcap: float | None = None,
) -> Tensor:
    """Scaled dot-product attention; each key/value head serves ``heads / kv_heads`` query heads (GQA).

    q: [batch, heads, length, d]    k, v: [batch, kv_heads, keys, d]    mask: bool or additive, broadcastable to
    [batch, heads, length, keys], or None: nothing hidden, but the future if ``causal``  ->  [batch, length, heads, d]
    """
    groups = q.shape[1] // k.shape[1]
    causal = bool(causal and mask is None and q.shape[2] > 1)
    if softcap is not None:
        return _softcapped(q, k, v, mask, scale, causal, softcap)
    if groups > 1 and mask is not None and q.shape[2] == 1:
        return _one_query(q, k, v, mask, scale)
    if groups > 1 and mask is not None:  # torch's kernels take GQA or a mask, not both without falling to the slow path
        k, v = repeat_heads(k, groups), repeat_heads(v, groups)
    y = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, is_causal=causal, enable_gqa=bool(groups > 1 and mask is None)
    )
    return y.transpose(1, 2).contiguous()


def _one_query(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """Attention of a single query: the heads of a group are its queries, and no key is copied.

    q: [batch, heads, 1, d]    k, v: [batch, kv_heads, keys, d]  ->  [batch, 1, heads, d]
    """
    batch, kv_heads, groups = q.shape[0], k.shape[1], q.shape[1] // k.shape[1]
    if mask.shape[1] != 1:
        mask = mask.reshape(mask.shape[0], kv_heads, groups, mask.shape[3])
    y = torch.nn.functional.scaled_dot_product_attention(
        q.reshape(batch, kv_heads, groups, q.shape[3]), k, v, attn_mask=mask, scale=scale
    )
    return y.reshape(batch, 1, q.shape[1], v.shape[3])


def repeat_heads(x: Tensor, groups: int) -> Tensor:
    """x: [batch, heads, length, d]  ->  [batch, heads * groups, length, d], each head ``groups`` times in a row."""
    return x[:, :, None].expand(-1, -1, groups, -1, -1).reshape(x.shape[0], -1, x.shape[2], x.shape[3])


def _softcapped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, causal: bool, softcap: float
) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = repeat_heads(k, groups), repeat_heads(v, groups)
    scores = torch.matmul(q, k.transpose(2, 3)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = torch.tanh(scores / softcap) * softcap
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, torch.finfo(scores.dtype).min)
    elif mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, v).transpose(1, 2).contiguous()


@op
def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Inverted dropout. ``training`` is an input of the graph, so that one graph has both modes."""
    return torch.nn.functional.dropout(x, p, bool(training))


@op
def cast_like(x: Tensor, like: Tensor) -> Tensor:
    """``x`` in the dtype of ``like``."""
    return x.to(like.dtype)
