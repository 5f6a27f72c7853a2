"""The packed forms of a weight, their ops, and how a graph's weight changes from one form to another.

One function per format packs and one op unpacks; fake quantization, artifacts, training and exporters all use these
two, so that they agree bit for bit.
"""

from __future__ import annotations

from typing import Literal

import torch

from graph.formats.activations import fake_quantize_input as fake_quantize_input
from graph.formats.affine import Affine as Affine
from graph.formats.fidelity import Fidelity as Fidelity
from graph.formats.fidelity import Tally as Tally
from graph.formats.fidelity import fidelity as fidelity
from graph.formats.format import Format as Format
from graph.formats.four_bit import BLOCKS as BLOCKS
from graph.formats.four_bit import FourBit as FourBit
from graph.formats.fuse import fuse_dequantize as fuse_dequantize
from graph.formats.int8 import Int8 as Int8
from graph.formats.lut_format import Lut as Lut
from graph.formats.lut_options import LutOptions as LutOptions
from graph.formats.memory import release_freed as release_freed
from graph.formats.rounding import rounded as rounded
from graph.formats.scaled import Scaled as Scaled
from graph.formats.shared import fused_weights as fused_weights
from graph.formats.shared import shared_largest as shared_largest
from graph.formats.stored import arguments as arguments
from graph.formats.stored import dense_value as dense_value
from graph.formats.stored import format_of as format_of
from graph.formats.stored import frozen as frozen
from graph.formats.stored import fused_with as fused_with
from graph.formats.stored import link_fused as link_fused
from graph.formats.stored import packed_sites as packed_sites
from graph.formats.stored import packed_tensors as packed_tensors
from graph.formats.stored import store_dense as store_dense
from graph.formats.stored import store_packed as store_packed
from graph.formats.stored import update_packed as update_packed
from graph.formats.stored import weight_name as weight_name
from graph.formats.ternary_format import Ternary as Ternary
from graph.formats.ternary_rule import TernaryRule as TernaryRule
from graph.formats.tokens import fake_quantize_tokens as fake_quantize_tokens
from graph.formats.vector_format import VectorLut as VectorLut

Scheme = Literal["nf4", "fp4", "int8", "fp8", "nvfp4", "mxfp8", "mxfp4", "int4"]
Share = Literal["row", "weight", "block"]

_FP8: dict[Share, tuple[int, int]] = {"row": (1, 0), "weight": (0, 0), "block": (128, 128)}
"""The rows and columns that share a scale."""


def make_format(
    scheme: Scheme,
    *,
    block: int | None = None,
    double_quant: bool = False,
    share: Share = "row",
    latent: bool = False,
    scale_dtype: torch.dtype = torch.float32,
) -> Format:
    """The format of a recipe's ``scheme``.

    ``block`` is of nf4, fp4 and int4, where it is 64 if nothing is said, and of int8, which then has one scale a row;
    ``double_quant`` of nf4 and fp4, ``share``, what has one scale, of fp8, ``latent``, float weights that are packed
    anew each time, of all but nf4, fp4 and int8 by row, and ``scale_dtype`` of those with float scales.
    """
    if scheme == "int8" and block is None:
        return Int8()
    if scheme == "nf4" or scheme == "fp4":
        return FourBit(scheme, block or 64, double_quant)
    if scheme == "fp8":
        return Scaled("fp8", *_FP8[share], scale_dtype, latent=latent)
    if scheme == "int4" or scheme == "int8":
        return Scaled(scheme, 1, block or 64, scale_dtype, latent=latent)
    return Scaled(scheme, latent=latent)
