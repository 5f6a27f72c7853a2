"""LUT weights of vectors: an index stands for the weights of several rows in one column, and each row may have a scale.

    packed    qc.dequantize_vector_lut(W.indices, W.lut, 1024, model, scale=…)
    latent    qc.fake_quantize_vector_lut(W.latent, W.lut, model, scale=…)
    training  qc.linear_vector_lut(x, W.indices, W.lut, 1024, model, scale=…, bias=…), or linear_fake_vector_lut

There is one table [n, V] for the whole weight, and vectors lie along the outputs: what the Neural Engine takes. Values,
gradients and rounding are those of single levels (lut.py): gradients go to whatever of the table and the scales is
trained, the index taken as constant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graph.formats.lut import DequantizeLut, FakeQuantizeLut, trains
from graph.formats.lut_linear import LinearFakeLut, LinearLut, product
from graph.formats.lut_scales import Factors, scale_factors
from graph.formats.ste import ste_fp16
from graph.formats.vector_weight import LatentVectors, PackedVectors
from graph.ops import op


@op
def dequantize_vector_lut(
    indices: Tensor,
    lut: Tensor,
    columns: int,
    dtype: torch.dtype,
    scale: Tensor | None = None,
    fp16: bool = False,
) -> Tensor:
    """The weight that packed indices stand for, ``lut[index[i // V, j], i % V] * scale[i]``, rounded once to ``dtype``.

    indices: u8 [out / V, ceil(columns * bits / 8)]    lut: [n, V]    scale: [out, 1]  ->  [out, columns]

    ``fp16`` rounds table and scales as a deployed graph holds them.
    """
    lut, factors = _held(lut, scale, fp16)
    if not trains(lut, *factors):
        return PackedVectors(indices, lut, columns, factors).dense().to(dtype)
    return DequantizeLut.apply(indices, lut, columns, None, PackedVectors, *factors).to(dtype)


@op
def fake_quantize_vector_lut(
    latent: Tensor, lut: Tensor, dtype: torch.dtype, scale: Tensor | None = None, fp16: bool = False
) -> Tensor:
    """A float weight made of the vectors nearest to its own, which are found again at every call.

    latent: [out, in]    the rest: as in ``dequantize_vector_lut``  ->  [out, in]

    Gradients are those of ``fake_quantize_lut``; of a latent weight and scales that train together, ``W / S`` counts as
    within reach of the table where it lies between the least and the greatest value there is in its place of a vector.
    """
    lut, factors = _held(lut, scale, fp16)
    if not trains(latent, lut, *factors):
        return LatentVectors(latent, lut, factors, None).dense().to(dtype)
    return FakeQuantizeLut.apply(latent, lut, None, LatentVectors, *factors).to(dtype)


@op
def linear_vector_lut(
    x: Tensor,
    indices: Tensor,
    lut: Tensor,
    columns: int,
    dtype: torch.dtype,
    scale: Tensor | None = None,
    fp16: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
    """``x`` times a weight of vectors, which is unpacked for the product and again for its backward.

    x: [..., in]    bias: [out]    the rest: as in ``dequantize_vector_lut``  ->  [..., out]
    """
    lut, factors = _held(lut, scale, fp16)
    if not trains(x, bias, lut, *factors):
        return product(x, PackedVectors(indices, lut, columns, factors), dtype, bias)
    return LinearLut.apply(x, bias, indices, lut, columns, dtype, None, PackedVectors, *factors)


@op
def linear_fake_vector_lut(
    x: Tensor,
    latent: Tensor,
    lut: Tensor,
    dtype: torch.dtype,
    scale: Tensor | None = None,
    fp16: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
    """``x`` times a latent weight made of vectors, which are found for the product and again for its backward.

    x: [..., in]    bias: [out]    the rest: as in ``fake_quantize_vector_lut``  ->  [..., out]
    """
    lut, factors = _held(lut, scale, fp16)
    if not trains(x, bias, latent, lut, *factors):
        return product(x, LatentVectors(latent, lut, factors, None), dtype, bias)
    return LinearFakeLut.apply(x, bias, latent, lut, dtype, None, LatentVectors, *factors)


def _held(lut: Tensor, scale: Tensor | None, fp16: bool) -> tuple[Tensor, Factors]:
    """Table and scales as they are computed with."""
    assert lut.dim() == 2, f"a table of the shape {list(lut.shape)} holds no vectors"
    return ste_fp16(lut.float()) if fp16 else lut, scale_factors(scale, None, None, None, None, fp16)
