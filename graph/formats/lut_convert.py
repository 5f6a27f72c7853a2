"""From one LUT format to another: indices frozen, scales with magnitudes (V1 to V2), fewer levels, all in fp16.

Each function takes a format and a packed weight, by suffix, and gives the new ones. All work on ``meta`` tensors too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graph.formats.bits import bits_for, look_up, pack_bits
from graph.formats.fit import row_slices
from graph.formats.format import has_data
from graph.formats.low_rank import ROUNDS, Fitted, fit_scales
from graph.formats.lut_format import Lut
from graph.formats.lut_levels import in_order
from graph.formats.lut_scales import SHORTEST, not_positive, scale_factors
from graph.formats.lut_weight import LatentWeight, PackedWeight, level_starts
from graph.formats.row_scales import LowRankScales
from graph.formats.scales import expand_rank, normal_form

Packed = Mapping[str, Tensor]

REFITS = 6
"""Rounds in which scales are refitted to a weight whose indices stay; each lowers the error by less."""


@dataclass(frozen=True)
class Converted:
    """A weight in its new format."""

    form: Lut
    packed: dict[str, Tensor]

    error: float = 0.0
    """``|new - old| / |old|`` in the Frobenius norm, 0 where that is exact or without values."""

    not_positive: float = 0.0
    """Share of the old scales that are zero or less."""


def freeze_indices(form: Lut, packed: Packed) -> Converted:
    """Give a latent weight the indices that it has now; levels and scales stay. Exact."""
    assert form.latent, "indices are frozen already"
    sides = {key: value for key, value in packed.items() if key != "latent"}
    weight = LatentWeight(packed["latent"].detach(), packed["lut"], _factors(form, packed), form.floor)
    return Converted(
        replace(form, latent=False), {"indices": pack_bits(weight.all_codes(), bits_for(form.levels)), **sides}
    )


def with_magnitudes(form: Lut, packed: Packed, *, refit: bool = True) -> Converted:
    """From ``S = max(A B, floor)`` to ``S = A diag(g) B`` of unit columns and rows; the indices stay.

    Exact where all of ``A B`` is above the floor. Elsewhere the old scales are cut off and the new ones, of the same
    rank, cannot be: with ``refit`` they are those of least squared error of ``Q S`` against the weight as it was,
    without they keep ``A B``, whose negative entries then turn weights around.
    """
    assert form.scale == "low-rank" and not form.latent and not form.magnitudes, "V1 scales over packed indices"
    a, b = (packed[key].detach().float() for key in ("scale_a", "scale_b"))
    columns, below = form.columns, not_positive((a, b), form.columns)
    share = below / (a.shape[0] * columns)
    old = PackedWeight(packed["indices"], packed["lut"], columns, (a, b), form.floor)
    if has_data(a) and share > 0 and refit:
        a, b = _refitted(old.dense(), look_up(packed["indices"], packed["lut"].float(), columns), a, b)
    length_a, length_b = _lengths(a, b)
    sides = {"scale_a": a / length_a, "scale_b": b / length_b[:, None], "scale_g": length_a * length_b}
    made = {"indices": packed["indices"], "lut": packed["lut"].detach(), **sides}
    new = replace(form, magnitudes=True, floor=None)
    return Converted(new, made, _distance(old, _weight(new, made)), share)


def _lengths(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The lengths of the columns of A and of the rows of B, or what these are divided by where that is more."""
    return a.norm(dim=0).clamp(min=SHORTEST), b.norm(dim=1).clamp(min=SHORTEST)


def _refitted(w: Tensor, q: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Scales of the same rank for which ``q * (a b)`` is nearer to w [out, in]; no round moves away from it."""
    scales = LowRankScales(*_in_order(a, b))
    rows, columns = w.shape
    for _ in range(REFITS):
        for part in row_slices(rows, columns):
            scales.solve_rows(part, q[part] * q[part], q[part] * w[part])
        scales.begin_columns()
        for part in row_slices(columns, rows):
            scales.solve_columns(part, q[:, part] * q[:, part], q[:, part] * w[:, part])
        scales = scales.orthonormal()
    return scales.a, scales.b


def _in_order(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    unit, g, right = normal_form(a, b)
    return unit * g, right


def requantized(form: Lut, packed: Packed, *, levels: int, rank: int, refit_scales: bool) -> Converted:
    """The same weight on other levels and with more ranks, which begin along the directions that lower the error most.

    Levels are those of least squared error of the *weight*: of ``W / S``, each counted S² times. With ``refit_scales``
    scales are fitted along with them; without, they stay what they are, and new ranks have magnitude 0.
    """
    assert form.magnitudes and not form.latent, "low-rank scales with magnitudes over packed indices"
    a, b = (packed[key].detach().float() for key in ("scale_a", "scale_b"))
    length_a, length_b = _lengths(a, b)
    g = packed["scale_g"].detach().float()
    old = _weight(form, packed)
    w = old.dense() if has_data(g) else a.new_empty(a.shape[0], form.columns)
    here = Fitted(packed["lut"].detach().float(), packed["indices"], a=a / length_a, g=g, b=b / length_b[:, None])
    found = _refit(form, w, levels, here, rounds=0)  # the levels; scales as they are
    if rank > form.rank:
        q = _levels(found, w.shape[0]) if has_data(g) else w
        wider_a, wider_g, wider_b = expand_rank(w, q, *_parts(found), rank)
        found = replace(found, a=wider_a, g=wider_g, b=wider_b)
    if refit_scales:
        found = _refit(form, w, levels, found, ROUNDS)
    new = replace(form, levels=levels, rank=rank)
    new_a, new_g, new_b = _parts(found)
    made = {"indices": pack_bits(found.indices, bits_for(levels)), "lut": found.levels}
    made |= {"scale_a": new_a, "scale_b": new_b, "scale_g": new_g}
    return Converted(new, made, _distance(old, _weight(new, made)))


def _refit(form: Lut, w: Tensor, levels: int, start: Fitted, rounds: int) -> Fitted:
    rank = _parts(start)[1].shape[0]
    symmetric, zero_free = form.symmetric, form.zero_free
    return fit_scales(
        w,
        levels,
        rank=rank,
        start=start,
        rounds=rounds,
        rows_per_lut=form.rows_per_lut,
        symmetric=symmetric,
        zero_free=zero_free,
    )


def _levels(found: Fitted, rows: int) -> Tensor:
    """The level of every index, f32 [out, in]."""
    at = found.indices.int() + level_starts(found.levels, rows, slice(0, rows))
    return found.levels.reshape(-1).index_select(0, at.view(-1)).view(found.indices.shape)


def _parts(found: Fitted) -> tuple[Tensor, Tensor, Tensor]:
    assert found.a is not None and found.g is not None and found.b is not None
    return found.a, found.g, found.b


def baked(form: Lut, packed: Packed) -> Converted:
    """As a device holds it: ``a = fp16(fp16(g) A)``, ``b = fp16(B)`` and levels in fp16, the indices untouched.

    The same rounding as that of ``fp16=True``, so a graph trained with that computes the same bits afterwards. Levels
    that are out of order, as training can leave them, are sorted, and the indices renumbered.
    """
    assert form.floor is None and not form.latent, "scales with a floor have no product form"
    factors = _factors(replace(form, fp16=True), packed)
    names = {0: (), 1: ("scale",), 2: ("scale_a", "scale_b")}[len(factors)]
    indices, lut = in_order(packed["indices"], packed["lut"].detach(), form.columns)
    made = {"indices": indices, "lut": lut.half()}
    made |= {name: factor.half() for name, factor in zip(names, factors, strict=True)}
    new = replace(form, magnitudes=False, baked=True, theta=False)
    return Converted(new, made, _distance(_weight(form, packed), _weight(new, made)))


def _factors(form: Lut, packed: Packed) -> tuple[Tensor, ...]:
    scale, a, b, g = (packed.get(key) for key in ("scale", "scale_a", "scale_b", "scale_g"))
    with torch.no_grad():
        return scale_factors(scale, a, b, g, form.floor, form.fp16)


def _weight(form: Lut, packed: Packed) -> PackedWeight:
    return PackedWeight(packed["indices"], packed["lut"], form.columns, _factors(form, packed), form.floor)


def _distance(old: PackedWeight, new: PackedWeight) -> float:
    if not has_data(old.lut):
        return 0.0
    was = old.dense()
    return math.sqrt(
        float((new.dense() - was).square().sum(dtype=torch.float64) / was.square().sum(dtype=torch.float64))
    )
