"""Which weights stay as they are where others are packed: those that cost the most of what their linears compute.

How much that is has to be measured, by ``calibrate`` and by packing each weight once for a trial; so of a plan, which
has no values, it is not known yet. There the first weights that fit stand in for those that are chosen in a compile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal, NamedTuple

import torch

from graph import Graph, QcError, Site
from graph.apart import Parcel, divided
from graph.formats import Format, Lut, Scaled, Ternary, VectorLut, format_of, packed_sites
from graph.formats.measured import pack_measured
from graph.importance import Candidate, output_error, within
from graph.moments import SUFFIX
from passes.base import Weighed

KEPT_BITS = 16
"""What a value that stays is counted at: exports write it as fp16 or bf16."""

FormFor = Callable[[Site, tuple[int, ...]], Format]
"""The format that a pass gives to the weight [out, in] of a site."""


@dataclass(frozen=True, kw_only=True)
class Keep:
    """How much may stay as it is; what does is chosen by how much of each linear's outputs packing would lose."""

    share: float | None = None
    """The share of the selected values that may stay."""

    bits: float | None = None
    """In its place: bits per weight that the selected weights may come to, those that stay counted at 16."""

    whole: Literal["linears", "blocks"] = "linears"
    """What stays or goes as one: a weight, or all selected weights of a block."""

    def mistakes(self) -> Iterator[QcError]:
        """Options that do not go together, whatever the model."""
        if (self.share is None) == (self.bits is None):
            what = "keep has neither share nor bits" if self.share is None else "keep has both share and bits"
            yield QcError(what, fix="give one of them: keep: {share: 0.1}")
        if self.share is not None and not 0 < self.share < 1:
            yield QcError(f"keep.share is {self.share:g}", fix="give a number between 0 and 1, such as 0.1")
        if self.bits is not None and not 0 < self.bits < KEPT_BITS:
            yield QcError(f"keep.bits is {self.bits:g}", fix=f"give a number below {KEPT_BITS}, such as 4")


class _Room(NamedTuple):
    """What a budget leaves for weights that are not packed yet, and what each of them takes of it."""

    budget: float
    costs: Mapping[str, float]


def problems(graph: Graph, keep: Keep, sites: Sequence[Site], form_for: FormFor) -> Iterator[QcError]:
    """What stands in the way of a choice among the weights of these sites, as far as shapes show it."""
    chosen = _open(sites)
    for name, site in chosen.items():
        if site.op == "aten.linear" and f"{name}{SUFFIX}" not in graph.tensors():
            what = f"keep goes by what calibrate measures, and nothing was measured for {name}"
            yield QcError(what, fix="run calibrate before, with the same select", site=site.name)
            return
    room, groups = _room(graph, keep, sites, form_for), _groups(keep, chosen)
    if not chosen or room.budget >= sum(room.costs.values()):
        return
    least = min(sum(room.costs[name] for name in group) for group in groups)
    if room.budget < 0:
        packed = _bits_of_all(graph, sites, form_for)
        what = f"keep.bits is {keep.bits:g}, and packed weights alone take {packed:.3g}"
        yield QcError(what, fix=f"give more than {packed:.3g}, or take keep out")
    elif room.budget < least:
        key, given = ("share", keep.share) if keep.bits is None else ("bits", keep.bits)
        whole = "weight" if keep.whole == "linears" else "block"
        what = f"keep.{key} is {given:g}, which is too little for any {whole}"
        yield QcError(what, fix=f"give more{', or set keep.whole to linears' if whole == 'block' else ''}")


def weighed(graph: Graph, keep: Keep, sites: Sequence[Site], form_for: FormFor) -> tuple[Weighed, ...]:
    """Every weight of these sites that is not packed yet, with its error, and whether it stays."""
    chosen, room = _open(sites), _room(graph, keep, sites, form_for)
    plan = [n for n in chosen if n not in graph.stored and graph.tensor(n).is_meta]
    values = {name: prod(graph.shape(name)) for name in chosen}
    if room.budget >= sum(room.costs.values()):
        return tuple(Weighed(name, None, values[name], True) for name in chosen)
    errors = {} if plan else _errors(graph, chosen, form_for)
    candidates = [
        Candidate(group, sum(room.costs[n] for n in group), sum(errors.get(n, 0.0) for n in group))
        for group in _groups(keep, chosen)
    ]
    kept = {name for one in within(candidates, room.budget) for name in one.names}
    return tuple(Weighed(name, errors.get(name), values[name], name in kept) for name in chosen)


def figures(found: Sequence[Weighed]) -> dict[str, float | int | str]:
    """What a report says of a choice."""
    kept = [one for one in found if one.kept]
    if not found:
        return {}
    said: dict[str, float | int | str] = {
        "chosen": ", ".join(f"{one.weight} ({_said(one.error)})" for one in kept) or "none",
        "chosen_share": round(sum(one.values for one in kept) / sum(one.values for one in found), 5),
    }
    if all(one.error is None for one in found) and len(kept) < len(found):
        said["chosen"] = f"{len(kept)} of {len(found)} weights, in a compile: a plan has no values to choose by"
    return said


def _said(error: float | None) -> str:
    return "not measured" if error is None else f"packing it would lose {error:.1%} of what it gives"


def _open(sites: Sequence[Site]) -> dict[str, Site]:
    """The weights that are not packed yet, each with its first reader."""
    found: dict[str, Site] = {}
    for site in sites:
        weight = site.weight()
        if weight is not None:
            found.setdefault(weight, site)
    return found


def _groups(keep: Keep, chosen: Mapping[str, Site]) -> list[tuple[str, ...]]:
    """What stays or goes as one; a weight outside of all blocks is by itself."""
    found: dict[object, tuple[str, ...]] = {}
    for name, site in chosen.items():
        key = site.block if keep.whole == "blocks" and site.block is not None else name
        found[key] = (*found.get(key, ()), name)
    return list(found.values())


def _room(graph: Graph, keep: Keep, sites: Sequence[Site], form_for: FormFor) -> _Room:
    """The budget, over those that are packed already too: a second run finds it spent, and nothing more to do."""
    chosen = _open(sites)
    sizes = {name: prod(graph.shape(name)) for name in chosen}
    total = sum(sizes.values()) + sum(prod(site.value.shape) for site in _packed(graph, sites))
    if keep.share is not None:
        return _Room(keep.share * total, {name: float(size) for name, size in sizes.items()})
    assert keep.bits is not None, "see mistakes()"
    costs = {
        name: KEPT_BITS * size - _packed_bits(form_for(chosen[name], graph.shape(name)), graph.shape(name))
        for name, size in sizes.items()
    }
    return _Room((keep.bits - _bits_of_all(graph, sites, form_for)) * total, costs)


def _bits_of_all(graph: Graph, sites: Sequence[Site], form_for: FormFor) -> float:
    """Bits per weight with everything packed."""
    shapes = [(graph.shape(name), form_for(site, graph.shape(name))) for name, site in _open(sites).items()]
    shapes += [(tuple(site.value.shape), format_of(site)) for site in _packed(graph, sites)]
    return sum(_packed_bits(form, shape) for shape, form in shapes) / sum(prod(shape) for shape, _ in shapes)


def _packed(graph: Graph, sites: Sequence[Site]) -> list[Site]:
    """The packed weights that these sites read."""
    read = {tensor for site in sites for tensor in site.tensors()}
    return [site for site in packed_sites(graph) if not read.isdisjoint(site.tensors())]


def _packed_bits(form: Format, shape: tuple[int, ...]) -> int:
    """Bits that a weight takes once it is packed and written, whatever it is while it trains."""
    w = torch.empty(shape, device="meta")
    if isinstance(form, (Lut, VectorLut)):
        return 8 * form.once_baked(form.pack(w))
    if isinstance(form, Ternary):
        form = replace(form, latent=False, baked=True)
    if isinstance(form, Scaled) and form.latent:
        form = form.packing
    return 8 * sum(side.nbytes for side in form.pack(w).values())


def _errors(graph: Graph, chosen: Mapping[str, Site], form_for: FormFor) -> dict[str, float]:
    """What each linear would lose; weights are read, packed for a trial and let go, as many at once as threads."""

    def tried(name: str) -> Parcel:
        site = chosen[name]
        moments = graph.tensor(f"{name}{SUFFIX}") if f"{name}{SUFFIX}" in graph.tensors() else None
        w = graph.tensor(name).detach()
        if not bool(torch.isfinite(w).all()):
            fix = "repair the model, or exclude this weight from select"
            raise QcError(f"{name} holds NaN or infinity", fix=fix, site=site.name)
        form = form_for(site, tuple(w.shape))
        packed = pack_measured(form, w, moments)
        return Parcel(said=output_error(form, w, packed, moments))

    weights = ((name, prod(graph.shape(name))) for name in chosen)
    found = divided("importance", tried, weights, None if graph.device.type == "cpu" else 1)
    return {name: float(parcel.said) for name, parcel in found}
