"""Linear layers over packed weights that never keep the dense weight: the backward unpacks it again.

    before    linear(x, qc.dequantize_4bit(W.indices, W.absmax, nf4, model), bias)
    after     qc.linear_4bit(x, W.indices, W.absmax, nf4, model, bias=bias)

LUT weights fuse into ``qc.linear_lut`` and ``qc.linear_fake_lut``, whose levels and scales can train, those of vectors
into ``qc.linear_vector_lut`` and ``qc.linear_fake_vector_lut``, ternary ones into ``qc.linear_ternary`` and
``qc.linear_fake_ternary``.
Values and gradients are bit-identical. Artifacts hold the form before; the training runtime fuses a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import linear

from graph.core import Graph
from graph.formats.affine import dequantize_affine
from graph.formats.format import has_data
from graph.formats.four_bit import block_scales, dequantize_4bit
from graph.formats.int8 import dequantize_int8
from graph.formats.lut_linear import linear_fake_lut, linear_lut
from graph.formats.scaled import Kind, Scaled, dequantize_scaled
from graph.formats.scaled_parts import largest_of, nearest
from graph.formats.ternary_linear import linear_fake_ternary, linear_ternary
from graph.formats.vector_lut import linear_fake_vector_lut, linear_vector_lut
from graph.ops import op, op_name
from graph.sites import set_tag, tag


@op
def linear_4bit(
    x: Tensor,
    indices: Tensor,
    absmax: Tensor,
    kind: str,
    dtype: torch.dtype,
    absmax_scale: Tensor | None = None,
    absmax_offset: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``x`` times a 4-bit weight, which is unpacked for the product and again for its backward.

    x: [..., in]    bias: [out]    the rest: as in ``dequantize_4bit``  ->  [..., out]
    """

    def dense(indices: Tensor, absmax: Tensor, scale: Tensor | None, offset: Tensor | None) -> Tensor:
        return dequantize_4bit(indices, absmax, kind, dtype, scale, offset)

    return linear_dequantized(x, bias, dense, indices, absmax, absmax_scale, absmax_offset)


@op
def linear_int8(x: Tensor, indices: Tensor, scale: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """``x`` times an 8-bit weight, which is unpacked for the product and again for its backward.

    x: [..., in]    bias: [out]    the rest: as in ``dequantize_int8``  ->  [..., out]
    """

    def dense(indices: Tensor, scale: Tensor) -> Tensor:
        return dequantize_int8(indices, scale, dtype)

    return linear_dequantized(x, bias, dense, indices, scale)


@op
def linear_scaled(
    x: Tensor,
    indices: Tensor,
    scale: Tensor,
    kind: Kind,
    dtype: torch.dtype,
    global_scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``x`` times a weight of codes and scales, which is unpacked for the product and again for its backward.

    x: [..., in]    bias: [out]    the rest: as in ``dequantize_scaled``  ->  [..., out]
    """

    def dense(indices: Tensor, scale: Tensor, divisor: Tensor | None) -> Tensor:
        return dequantize_scaled(indices, scale, kind, dtype, divisor)

    return linear_dequantized(x, bias, dense, indices, scale, global_scale)


@op
def linear_affine(
    x: Tensor,
    indices: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    dtype: torch.dtype,
    group: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``x`` times a weight of integers with zeros, which is unpacked for the product and again for its backward.

    x: [..., in]    bias: [out]    the rest: as in ``dequantize_affine``  ->  [..., out]
    """

    def dense(indices: Tensor, scale: Tensor, zero: Tensor, group: Tensor | None) -> Tensor:
        return dequantize_affine(indices, scale, zero, bits, dtype, group)

    return linear_dequantized(x, bias, dense, indices, scale, zero, group)


@op
def linear_fake_scaled(
    x: Tensor,
    latent: Tensor,
    kind: Kind,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    scale_dtype: torch.dtype = torch.float32,
    fused: list[Tensor | float] | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``x`` times a latent weight as it would be packed, which is found for the product and again for its backward.

    x: [..., in]    bias: [out]    the rest: as in ``fake_quantize_scaled``  ->  [..., out]
    """
    form = Scaled(kind, rows, columns, scale_dtype)
    if fused and form.whole and has_data(latent):
        form = replace(form, largest=largest_of([latent, *fused]))
    return _LinearFakeScaled.apply(x, latent, bias, form, dtype)


class _LinearFakeScaled(torch.autograd.Function):
    """Keeps the latent weight, which is there anyway; the gradient of the packed one is that of the latent."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        latent: Tensor,
        bias: Tensor | None,
        form: Scaled,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(x, latent)
        ctx.form, ctx.dtype, ctx.bias_dtype = form, dtype, None if bias is None else bias.dtype
        return linear(x, nearest(form, latent, dtype).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, latent = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        d_x = d_latent = d_bias = None
        if ctx.needs_input_grad[0]:
            d_x = (grad @ nearest(ctx.form, latent, ctx.dtype).to(grad.dtype)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            d_latent = (flat.t() @ x.flatten(0, -2).to(grad.dtype)).to(latent.dtype)
        if ctx.needs_input_grad[2]:
            d_bias = flat.sum(0).to(ctx.bias_dtype)
        return d_x, d_latent, d_bias, None, None


FUSED: dict[str, Callable[..., Tensor]] = {
    "qc.dequantize_4bit": linear_4bit,
    "qc.dequantize_int8": linear_int8,
    "qc.dequantize_scaled": linear_scaled,
    "qc.dequantize_affine": linear_affine,
    "qc.dequantize_lut": linear_lut,
    "qc.fake_quantize_lut": linear_fake_lut,
    "qc.dequantize_vector_lut": linear_vector_lut,
    "qc.fake_quantize_vector_lut": linear_fake_vector_lut,
    "qc.dequantize_ternary": linear_ternary,
    "qc.fake_quantize_ternary": linear_fake_ternary,
    "qc.fake_quantize_scaled": linear_fake_scaled,
}
"""The op that takes in each unpacking op: ``x``, that op's arguments, ``bias``."""


def fuse_dequantize(graph: Graph) -> int:
    """Fuse every linear with the op that unpacks its weight; return how many. Sites keep their names and tags."""
    fused = 0
    for site in graph.sites("aten.linear"):
        unpacking = _unpacking(site.node.args[1])
        if unpacking is None:
            continue
        x, _, *bias = site.node.args
        site.node.target = FUSED[op_name(unpacking.target)]
        site.node.args = (x, *unpacking.args)
        site.node.kwargs = {**unpacking.kwargs, **({"bias": bias[0]} if bias and bias[0] is not None else {})}
        if tag(unpacking, "model_dtype", False):
            set_tag(site.node, model_dtype=True)
        fused += 1
    graph.verify()
    return fused


def unnest_scales(graph: Graph) -> int:
    """Store the scales of fused 4-bit linears in fp32 where they are in 8 bits; return how many weights had such.

    For the copy that trains: 0.37 bits per weight more, and a tenth of the time that unpacking takes less.
    """
    sites = [site for site in graph.sites("qc.linear_4bit") if "absmax_scale" in site.node.kwargs]
    for site in sites:
        absmax, scale, offset = (site.node.args[2], *(site.node.kwargs[f"absmax_{end}"] for end in ("scale", "offset")))
        names = [str(node.target) for node in (absmax, scale, offset) if isinstance(node, fx.Node)]
        if graph.dtype_of(names[0]) == torch.uint8:  # else a tied weight, which another site has seen to
            graph.set_tensor(names[0], block_scales(*(graph.tensor(name) for name in names)))
        kept = {key: value for key, value in site.node.kwargs.items() if not key.startswith("absmax_")}
        site.node.kwargs = kept
    graph.module.graph.eliminate_dead_code()
    graph.verify()
    return len(sites)


def _unpacking(weight: Any) -> fx.Node | None:
    """The node that unpacks ``weight``, looking through the cast behind a ``compute_dtype``."""
    if isinstance(weight, fx.Node) and weight.op == "call_function":
        if op_name(weight.target) == "aten.to.dtype" and tag(weight, "model_dtype", False):
            return _unpacking(weight.args[0])
        if op_name(weight.target) in FUSED:
            return weight
    return None


def linear_dequantized(x: Tensor, bias: Tensor | None, dense: Callable[..., Tensor], *packed: Tensor | None) -> Tensor:
    """``linear(x, dense(*packed), bias)``; for the backward only ``packed`` is kept. The weight gets no gradient.

    x: [..., in]    bias: [out]    dense gives [out, in], which is cast to the dtype of x  ->  [..., out]
    """
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _LinearDequantized.apply(x, bias, dense, *packed)
    return linear(x, dense(*packed).to(x.dtype), bias)


class _LinearDequantized(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, dense: Callable[..., Tensor], *packed: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(*packed)
        ctx.dense, ctx.x_dtype = dense, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return linear(x, dense(*packed).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        packed = ctx.saved_tensors
        d_x = d_bias = None
        if ctx.needs_input_grad[0]:  # under autocast the product was in grad's dtype, not in that of x
            d_x = (grad @ ctx.dense(*packed).to(grad.dtype)).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            d_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
        return d_x, d_bias, None, *(None for _ in packed)
