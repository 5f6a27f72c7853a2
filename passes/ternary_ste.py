"""Make weights ternary as they are read, and train the floats behind them.

    before    y = linear(x, W)
    after     W/fake_quantize = qc.fake_quantize_ternary(W.latent, model, dead-zone, 0.1, absmean, 1024)
              y = linear(x, W/fake_quantize)

The weights are -1, 0 or 1 times a scale, found anew at every step; gradients reach the floats unchanged, straight
through. With ``act_bits: 8`` the linears read their inputs in 8 bits too, one scale a token:

    8 bits    x/int8 = qc.fake_quantize_tokens(x, 8)
              y = linear(x/int8, W/fake_quantize)

Weights are chosen by what reads them. Embeddings and head stay as they are unless ``select`` names them by role or
name; norms and biases always do. With ``keep``, so do the linears that would lose most of what they compute, within a
budget. The report lists what is kept, and what each linear would lose.

Where ``calibrate`` measured a covariance, the floats do not begin as W but as such in which the rule finds the integers
and scales of least error at the outputs (graph/formats/ternary_start.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, fx

from graph import Graph, QcError, Selector, Site
from graph.formats import Tally, Ternary, TernaryRule, fidelity, packed_sites, store_packed
from graph.formats.ternary_start import begun
from graph.moments import COVARIANCE, SUFFIX, take_moments, unused_covariance
from graph.ops import op_name
from graph.sites import node_name
from passes.base import BLOCK_WEIGHTS, Lossy, Pass, Report
from passes.keeping import FormFor, Keep, problems, weighed
from passes.keeping import figures as importance

SIZES = (
    ("tiny", 50e6, 0.05, 6),
    ("small", 500e6, 0.10, 8),
    ("medium", 2e9, 0.15, 10),
    ("large", float("inf"), 0.2, 12),
)
"""Categories of models: parameters that they are below, threshold, and how many times smaller than fp32 is aimed at."""


@dataclass(frozen=True, kw_only=True)
class TernarySte(Pass):
    """Make the weight of every selected linear ternary each time it is read, and train the floats behind it."""

    contract = Lossy(min_psnr_db=0.0, min_weight_snr_db=0.0)  # a scaled sign is never further off than zero is
    ops = ("aten.linear", "aten.embedding")

    select: Selector = BLOCK_WEIGHTS
    """Which weights. Without a role or a name in it, embeddings and head are left out."""

    rule: Literal["dead-zone", "round-clip"] = "dead-zone"
    """dead-zone: 0 below `tau` times the mean magnitude, else the sign; round-clip: the nearest of -1, 0 and 1 times
    that mean, as in BitNet b1.58."""

    tau: float | None = None
    """Threshold of the dead zone; without it 0.05, 0.1, 0.15 or 0.2 for models below 50 M, 500 M, 2 B parameters or
    above."""

    scale: Literal["absmean", "least-squares"] = "absmean"
    """The mean magnitude, or the scale of least squared error, by what `calibrate` measured if that ran before."""

    granularity: Literal["channel", "group", "tensor"] = "channel"
    """One scale a row, one for every `group` columns of it, or one for the whole weight."""

    group: int | None = None
    """Columns that share a scale, for granularity: group."""

    act_bits: Literal[8] | None = None
    """Bits of what the linears read, one scale a token; without it as they are."""

    keep: Keep | None = None
    """How much of the selected weights stays as it is: those that cost most, by what `calibrate` measured."""

    train: Literal["weights", "scales", "weights+scales", "none"] = "weights"
    """What trains, as the groups of these names. Scales that train are no longer found from the weights."""

    def __post_init__(self) -> None:
        if self.select.role is None and self.select.name is None:
            given = self.select.exclude or ()
            kept = (*((given,) if isinstance(given, str) else given), "embed", "head")
            object.__setattr__(self, "select", replace(self.select, exclude=kept))

    def by(self, columns: int, tau: float) -> TernaryRule:
        """The rule for a weight of so many columns, in a model of this threshold."""
        group = {"channel": columns, "group": self.group, "tensor": None}[self.granularity]
        return TernaryRule(self.rule, tau if self.rule == "dead-zone" else None, self.scale, group)

    def check(self, graph: Graph) -> Sequence[QcError]:
        """Options that do not go together, and every selected weight that cannot become ternary."""
        found = list(self._mistakes())
        try:
            sites = self.select.pick(graph.sites(*self.ops), graph.blocks)
        except QcError as error:
            return [*found, error]
        if not found:
            found += [error for site in sites for error in self._problems(graph, site)]
        if not found and self.keep is not None:
            found += problems(graph, self.keep, sites, self._form_for(graph))
        return found

    def _form_for(self, graph: Graph) -> FormFor:
        """The format of a weight in this graph."""
        _, tau, _ = self._size(graph)
        return lambda site, shape: Ternary(columns=shape[1], by=self.by(shape[1], tau))

    def _mistakes(self) -> Iterator[QcError]:
        yield from self.keep.mistakes() if self.keep is not None else ()
        if self.tau is not None and self.rule == "round-clip":
            yield QcError("tau is given, and round-clip has no threshold", fix="take tau out, or set rule to dead-zone")
        if self.tau is not None and not 0 < self.tau <= 1:
            what = f"tau is {self.tau:g}, a share of the mean magnitude"
            yield QcError(what, fix="give a number above 0 and up to 1, such as 0.1")
        if self.granularity == "group" and (self.group is None or self.group < 1):
            yield QcError("granularity is group, and no group is given", fix="set group to 128, say")
        if self.granularity != "group" and self.group is not None:
            what = f"group is given, and granularity is {self.granularity}"
            yield QcError(what, fix="set granularity to group, or take group out")

    def _problems(self, graph: Graph, site: Site) -> Iterator[QcError]:
        weight = site.weight()
        if weight is None:
            form = next((p.op for p in packed_sites(graph) if set(p.tensors()) & set(site.tensors())), None)
            if form is None:
                yield QcError(
                    "the weight is computed in the graph, not stored", fix="exclude it from select", site=site.name
                )
            elif not form.endswith("_ternary"):
                what = "the weight is packed in another format"
                yield QcError(what, fix="dequantize it first, or exclude it from select", site=site.name)
            return
        shape = graph.shape(weight)
        problem = Ternary(columns=shape[-1], by=self.by(shape[-1], 0.1)).problem(weight, shape)
        if problem is not None:
            problem.site = site.name
            yield problem
        if self.scale == "absmean" and self.keep is None and f"{weight}{SUFFIX}" in graph.tensors():
            what = f"calibrate measured what reads {weight}, and a scale of absmean does not use it"
            yield QcError(what, fix="set scale to least-squares, or take calibrate out", site=site.name)
        elif self.scale == "absmean":
            unused = unused_covariance(graph, weight, "with a scale of absmean weights begin as they are")
            if unused is not None:
                unused.site = site.name
                yield unused
        if self.act_bits is not None and any(_op(user) == "qc.lora" for user in site.node.users):
            what = f"{site.name} has an adapter, which would read other inputs"
            yield QcError(what, fix="move this pass before add-lora, or take act_bits out", site=site.name)

    def run(self, graph: Graph) -> Report:
        """Rewrite one weight after the other; those that read the same value read the same rounding of it."""
        category, tau, ratio = self._size(graph)
        figures, changed, zeros = Tally(), [], 0
        rounded: dict[fx.Node, fx.Node] = {}
        sites = self.select.pick(graph.sites(*self.ops), graph.blocks)
        found = weighed(graph, self.keep, sites, self._form_for(graph)) if self.keep is not None else ()
        stay = {one.weight for one in found if one.kept}
        for site in sites:
            weight = site.weight()
            if weight is None or weight in stay:
                continue
            changed += [reader.name for reader in graph.sites(*self.ops) if reader.weight() == weight]
            zeros += self._rewrite(graph, weight, site, tau, figures)
            if self.act_bits is not None and site.op == "aten.linear":
                _round_input(graph, site, rounded, self.act_bits)
        if not changed:
            return Report((), weighed=found)
        said: dict[str, Any] = {"size": category, "target_ratio": ratio, "rule": self.rule}
        said |= {"tau": tau} if self.rule == "dead-zone" else {}
        said |= {key: value for key, value in figures.summary().items() if not key.startswith("b")}
        said |= {"zero_share": round(zeros / figures.weights, 5), **_kept(graph)}
        return Report(tuple(dict.fromkeys(changed)), said | importance(found), found)

    def _size(self, graph: Graph) -> tuple[str, float, int]:
        """The category of the model, the threshold, and how many times smaller it shall become."""
        count = sum(prod(graph.shape(name)) for name, info in graph.tensors().items() if info.kind == "parameter")
        category, _, tau, ratio = next(size for size in SIZES if count < size[1])
        return category, tau if self.tau is None else self.tau, ratio

    def _rewrite(self, graph: Graph, weight: str, site: Site, tau: float, figures: Tally) -> int:
        """Make one weight ternary; how many of its values are 0."""
        w, moments = graph.tensor(weight).detach(), take_moments(graph, weight)
        covariance = take_moments(graph, weight, COVARIANCE)
        moments = moments if self.scale == "least-squares" and covariance is None else None
        if not w.is_meta and not bool(torch.isfinite(w).all()):
            fix = "repair the model, or exclude this weight from select"
            raise QcError(f"{weight} holds NaN or infinity", fix=fix, site=site.name)
        by, own = self.by(int(w.shape[1]), tau), "scales" in self.train
        w = self._start(graph, weight, w, by)
        form = Ternary(columns=int(w.shape[1]), by=by, own_scale=own, weighted=moments is not None)
        packed = form.pack(w if covariance is None else begun(w, covariance, by), moments)
        found = None if w.is_meta else fidelity(form, w, packed)
        nearest = found is None or found.faithful or covariance is not None
        assert nearest, f"{weight} at {site}: further off than {form.name} allows, a bug"
        figures.add(weight, w, packed, found)
        store_packed(graph, weight, form, packed)
        for suffix, group in (("latent", "weights"), ("scale", "scales")):
            if f"{weight}.{suffix}" in graph.tensors():
                trains = group in self.train.split("+")
                graph.set_info(f"{weight}.{suffix}", trainable=trains, group=group if trains else None)
        return form.zeros(packed)

    def _start(self, graph: Graph, weight: str, w: Tensor, by: TernaryRule) -> Tensor:
        """The latent weight that w begins as: itself."""
        return w


def _round_input(graph: Graph, site: Site, rounded: dict[fx.Node, fx.Node], bits: int) -> None:
    x = site.input(0)
    if _op(x) == "qc.fake_quantize_tokens":
        return
    if x not in rounded:
        name = f"{node_name(x)}/int{bits}"
        rounded[x] = graph.insert("qc.fake_quantize_tokens", x, bits, name=name, before=site.node)
    site.set_input(0, rounded[x])


def _kept(graph: Graph) -> dict[str, Any]:
    """The matrices that stay as they are, and how many values that is."""
    latent = {name for site in packed_sites(graph) for name in site.tensors()}
    names = [
        name
        for name, info in graph.tensors().items()
        if info.kind == "parameter" and name not in latent and len(graph.shape(name)) > 1
    ]
    values = sum(prod(graph.shape(name)) for name in graph.tensors() if name in names)
    return {"kept": ", ".join(names) or "none", "kept_values": values}


def _op(node: fx.Node) -> str | None:
    return op_name(node.target) if node.op == "call_function" else None
