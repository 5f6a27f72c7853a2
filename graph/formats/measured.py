"""Packing a weight by what was measured of its inputs, for the formats that heed it."""

from __future__ import annotations

from torch import Tensor

from graph.formats.format import Format
from graph.formats.lut_format import Lut
from graph.formats.scaled import Scaled
from graph.formats.ternary_format import Ternary
from graph.formats.vector_format import VectorLut


def pack_measured(
    form: Format, w: Tensor, moments: Tensor | None = None, covariance: Tensor | None = None
) -> dict[str, Tensor]:
    """The side tensors of w [out, in].

    moments: [in], the inputs' mean squares, which weigh the fit of scales    covariance: [in, in], their mean products,
    by which codes are rounded with feedback
    """
    if isinstance(form, (Lut, VectorLut)):
        return form.pack(w, moments, covariance)
    if isinstance(form, Ternary):
        return form.pack(w, moments)
    return form.pack(w, covariance) if isinstance(form, Scaled) else form.pack(w)
