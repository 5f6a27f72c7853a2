"""A LUT weight moved to another float weight without leaving its format: what merging an update into it needs.

An update is small beside the steps between levels, so that with the scales kept most indices stay where they are and
little of it survives. Here scales, levels and indices move together, from where they are, towards least squared error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graph.formats.bits import bits_for, pack_bits
from graph.formats.format import chunks, has_data, unpack
from graph.formats.levels import fit_levels, trainable_levels
from graph.formats.low_rank import Fitted, fit_scales
from graph.formats.lut_convert import baked
from graph.formats.lut_format import Lut
from graph.formats.lut_scales import scale_factors
from graph.formats.lut_weight import LatentWeight
from graph.formats.scales import normal_form

Packed = Mapping[str, Tensor]

REFITS = 16
"""Rounds at most; they end where another gains a fifth of a per cent."""

SCALES = ("scale", "scale_a", "scale_b", "scale_g")


@dataclass(frozen=True)
class Refit:
    """A weight in the format that it had, nearer to what it shall be."""

    packed: dict[str, Tensor]

    kept_scales: dict[str, Tensor]
    """What picking the nearest levels alone would have given, scales and levels as they were."""


def refitted(form: Lut, packed: Packed, w: Tensor, moments: Tensor | None = None) -> Refit:
    """The packed weight of this format that is nearest to w [out, in], starting from ``packed``.

    moments: [in], the inputs' mean squares, by which the errors of the columns count, or None. Never further off than
    with the scales kept.
    """
    w = w.detach().float()
    lut = packed["lut"].detach().float().sort(dim=-1).values
    start = {key: packed[key].detach() for key in SCALES if key in packed} | {"lut": lut.to(packed["lut"].dtype)}
    kept = _nearest(form, start, w)
    if not has_data(w):
        return Refit(kept, kept)
    made = _nearest(form, _fitted(form, start, kept, w, moments), w)
    better = _error(form, made, w, moments) <= _error(form, kept, w, moments)
    return Refit(made if better else kept, kept)


def _nearest(form: Lut, sides: Packed, w: Tensor) -> dict[str, Tensor]:
    """``w`` on the grid of these levels and scales."""
    if form.latent:
        return {"latent": w, **sides}
    weight = LatentWeight(w, sides["lut"].float(), _factors(form, sides), form.floor)
    return {"indices": pack_bits(weight.all_codes(), bits_for(form.levels)), **sides}


def _fitted(form: Lut, start: Packed, kept: Packed, w: Tensor, moments: Tensor | None) -> dict[str, Tensor]:
    """Levels and scales of least squared error, in the form that the format stores them in."""
    kind = {"symmetric": form.symmetric, "zero_free": form.zero_free}
    if form.scale == "none":
        weight = None if moments is None else moments.expand_as(w)
        tables = w.view(start["lut"].numel() // form.levels, -1)
        weights = [None] * len(tables) if weight is None else list(weight.reshape(tables.shape))
        levels = [fit_levels(t, form.levels, m, **kind) for t, m in zip(tables, weights, strict=True)]
        return {"lut": torch.stack(levels).view(start["lut"].shape).to(w.device, start["lut"].dtype)}
    rank = form.rank if form.scale == "low-rank" else None
    group = form.group if form.scale == "group" else None
    found = fit_scales(
        w, form.levels, rank=rank, group=group, moments=moments, rows_per_lut=form.rows_per_lut, rounds=REFITS,
        start=_begin(form, start, w), **kind,
    )  # fmt: skip
    sides = {"lut": trainable_levels(found.levels) if form.theta else found.levels}
    if found.scale is not None:
        sides["scale"] = found.scale
    else:
        assert found.a is not None and found.g is not None and found.b is not None
        v2 = form.magnitudes or form.baked
        sides |= {"scale_a": found.a, "scale_b": found.b, "scale_g": found.g}
        sides = sides if v2 else sides | {"scale_a": found.a * found.g}
        if not v2:
            del sides["scale_g"]
    if not form.baked:
        return {key: value.contiguous() for key, value in sides.items()}
    unbaked = replace(form, baked=False, magnitudes="scale_g" in sides)
    made = baked(unbaked, {"indices": kept["indices"], **sides}).packed
    return {key: value for key, value in made.items() if key != "indices"}


def _begin(form: Lut, start: Packed, w: Tensor) -> Fitted:
    """The levels and scales that there are, as the fit takes them."""
    nothing = w.new_empty(0, dtype=torch.uint8)
    factors = _factors(form, start)
    if len(factors) == 1:
        return Fitted(start["lut"].float(), nothing, scale=factors[0])
    a, g, b = normal_form(*factors)
    return Fitted(start["lut"].float(), nothing, a=a, g=g, b=b)


def _factors(form: Lut, sides: Packed) -> tuple[Tensor, ...]:
    scale, a, b, g = (sides.get(key) for key in SCALES)
    return scale_factors(scale, a, b, g, form.floor, form.fp16)


def _error(form: Lut, packed: Packed, w: Tensor, moments: Tensor | None) -> float:
    stored = unpack(form, packed, torch.float32)
    squares = sum((stored[part] - w[part]).square().sum(0, dtype=torch.float64) for part in chunks(w))
    assert isinstance(squares, Tensor)
    return float((squares if moments is None else squares * moments).sum())
