"""Hand packed ternary weights to a training, in a form that trains.

    dequant           y = linear(x, W)                                  W float, its old scales beside it
    ste_latent        y = linear(x, qc.fake_quantize_ternary(W.latent, ...))
    lora_on_ternary   y = linear(x, qc.dequantize_ternary(W.indices, W.scale, ...)), and qc.lora beside it

Integers are no leaves of a gradient, and need not be: floats in their place are, latent floats behind a rounding are,
and gradients pass through frozen integers to what stands beside them. All three begin as the packed model, to the bit;
latent weights to the rounding of one multiplication.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import fx

from graph import Graph, QcError, Selector, Site
from graph.formats import Ternary, format_of, weight_name
from passes.add_lora import AddLora
from passes.base import BLOCK_WEIGHTS, Close, Exact, Pass, Report
from passes.dequantize import Dequantize
from passes.requantize_ternary import RequantizeTernary


@dataclass(frozen=True, kw_only=True)
class HandOff(Pass):
    """Turn packed ternary weights into something that trains, and that begins as they are."""

    contract = Exact()
    idempotent = False  # a second run finds no packed weights, and says so

    select: Selector = BLOCK_WEIGHTS
    """Linears whose weights are packed ternary ones."""

    form: Literal["dequant", "ste_latent", "lora_on_ternary"] = "dequant"
    """dequant: floats that are trained freely, and made ternary again afterwards; ste_latent: floats behind a rounding;
    lora_on_ternary: a low-rank update beside the integers, which stay."""

    rule: Literal["dead-zone", "round-clip"] = "dead-zone"
    """With ste_latent: how the floats are rounded from now on."""

    tau: float | None = None
    """With ste_latent and the dead zone: its threshold; without it the one for models of this size."""

    rank: int = 8
    """With lora_on_ternary: inner dimension of the update."""

    alpha: float = 16
    """With lora_on_ternary: the update is multiplied by alpha / rank."""

    def __post_init__(self) -> None:
        if self.form == "ste_latent":
            object.__setattr__(self, "contract", Close(atol=1e-3, rtol=1e-3))

    def check(self, graph: Graph) -> Sequence[QcError]:
        """Options that belong to another form, and weights that cannot take this one."""
        owners = {"tau": "ste_latent", "rank": "lora_on_ternary", "alpha": "lora_on_ternary"}
        defaults = {"tau": None, "rank": 8, "alpha": 16}
        for key, owner in owners.items():
            if getattr(self, key) != defaults[key] and self.form != owner:
                return [QcError(f"{key} belongs to the form {owner}", fix=f"take {key} out, or set form to {owner}")]
        try:
            linears = self.select.pick(graph.sites("aten.linear"), graph.blocks)
        except QcError as error:
            return [error]
        plain = [linear for linear in linears if _packed(linear) is None]
        if plain:
            fix = "run freeze-ternary first, or exclude it from select"
            return [QcError("the weight is not packed as ternary", site=one.name, fix=fix) for one in plain]
        if self.form == "lora_on_ternary":
            return self._lora(linears).check(graph)
        if self.form == "ste_latent" and len({_sharing(linear) for linear in linears}) > 1:
            what = "some weights have scales by row, some by group, some one for all"
            return [QcError(what, fix="hand those of one kind over at a time, with select")]
        return ()

    def run(self, graph: Graph) -> Report:
        """Rewrite what is selected; what it became trains as the group ``weights``, or ``lora.default``."""
        linears = self.select.pick(graph.sites("aten.linear"), graph.blocks)
        if self.form == "lora_on_ternary":
            return self._lora(linears).run(graph)
        sites = {site.name: site for linear in linears if (site := _packed(linear)) is not None}
        names, changed = [weight_name(site) for site in sites.values()], (*sites, *(one.name for one in linears))
        granularity, group = _sharing(linears[0])
        report = Dequantize(select=Selector(name=tuple(sites))).run(graph)
        graph.verify()
        if self.form == "ste_latent":
            report = RequantizeTernary(
                select=_named(linears), rule=self.rule, tau=self.tau, granularity=granularity, group=group
            ).run(graph)
        for name in names if self.form == "dequant" else ():
            graph.set_info(name, trainable=True, group="weights")
        return replace(report, changed=changed)

    def _lora(self, linears: Sequence[Site]) -> AddLora:
        return AddLora(select=_named(linears), rank=self.rank, alpha=self.alpha)


def _named(sites: Sequence[Site]) -> Selector:
    return Selector(name=tuple(site.name for site in sites))


def _packed(linear: Site) -> Site | None:
    """The site that unpacks the ternary weight of a linear; None if it has another."""
    reads = linear.node.args[1]
    unpacked = isinstance(reads, fx.Node) and Site(linear.graph, reads).op == "qc.dequantize_ternary"
    return Site(linear.graph, reads) if unpacked and isinstance(reads, fx.Node) else None


def _sharing(linear: Site) -> tuple[Literal["channel", "group", "tensor"], int | None]:
    """Who shares a scale, in the words of ``ternary-ste``."""
    site = _packed(linear)
    form = None if site is None else format_of(site)
    assert isinstance(form, Ternary), f"{linear.name} has no ternary weight"
    if form.by.group is None:
        return "tensor", None
    return ("channel", None) if form.by.group == form.columns else ("group", form.by.group)
