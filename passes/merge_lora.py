"""Merge LoRA sets into the weights beneath them.

    before    up = linear(x, W)
              up/lora.default = qc.lora(up, x, up.lora_A.default.weight, up.lora_B.default.weight, 16.0)
    after     up = linear(x, W)

W is then what ``W + alpha / r B A`` rounds to where it is stored. The report says how much of the update that kept:
little where it is smaller than the steps of a packed weight. Requantized, a LUT weight (in any form) moves from
where it is to ``W + alpha / r B A``: scales, levels and indices together, which keeps more than picking indices anew
would; the report has both, and the share of every linear.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from graph import Graph, QcError, QcErrors, raise_all
from graph.lora_base import fingerprint
from graph.lora_merge import Into, Kept, Merged, changed_base, float_base, merge_site, obstacles, read_float_base
from graph.lora_sets import Update, detach, set_names, updates
from passes.base import Close, Lossy, Pass, Report

CLOSE = Close(atol=1e-4, rtol=1e-4)
OTHER_BASE = Lossy(min_psnr_db=10.0, min_weight_snr_db=-math.inf)
"""Outputs are held, and not weights: an update may be larger than what it was added to."""


@dataclass(frozen=True, kw_only=True)
class MergeLora(Pass):
    """Merge sets into their linears; the graph is as it was before add-lora, with other weights."""

    contract = CLOSE
    idempotent = False

    set: str | tuple[str, ...] | None = None
    """The set, or several; without it all."""

    into: Into = "dequantized"
    """What a packed base becomes: dequantized floats, the full float weights of ``base``, or requantized integers."""

    base: str | None = field(default=None, metadata={"path": True})
    """For into: full, the folder of the float model that was quantized."""

    force_base: bool = False
    """Merge even where a weight is not the one that the set was added to."""

    def __post_init__(self) -> None:
        if self.into == "requantized" or self.base is not None:
            object.__setattr__(self, "contract", OTHER_BASE)

    def check(self, graph: Graph) -> Sequence[QcError]:
        """Sets that are not there, and weights that cannot take them."""
        try:
            found = self._updates(graph)
            return obstacles(graph, found, self.into, self.base)
        except QcErrors as errors:
            return errors.errors
        except QcError as error:
            return [error]

    def _updates(self, graph: Graph) -> list[Update]:
        """The updates to merge. Selected are linears."""
        there = set_names(graph)
        wanted = there if self.set is None else [self.set] if isinstance(self.set, str) else list(self.set)
        if not there:
            raise QcError("the graph has no LoRA to merge", fix="take merge-lora out, or add-lora first")
        fix = f"its sets are {', '.join(there)}"
        raise_all([QcError(f"the graph has no LoRA set {name!r}", fix=fix) for name in wanted if name not in there])
        found = updates(graph, wanted)
        picked = self.select.pick([update.site for update in found], graph.blocks, what="linear with LoRA")
        return [update for update in found if update.site in picked]

    def run(self, graph: Graph) -> Report:
        """Merge one linear after the other; nothing is touched before every base is known to be the right one."""
        raise_all(self.check(graph))
        found = self._updates(graph)
        raise_all([] if self.force_base else changed_base(graph, found))
        sites = {update.site.name: update.site for update in found}
        stored = {} if self.base is None else float_base(graph, list(sites.values()), self.base)
        kept = {}
        for name, site in sites.items():
            weight = read_float_base(graph, site, stored[name], force=self.force_base) if name in stored else None
            kept[name] = merge_site(graph, [update for update in found if update.site.name == name], self.into, weight)
        detach(graph, found)
        for update in updates(graph):
            if update.site.name in sites:  # what is left was trained beside what is in the weight now
                graph.set_tensor(update.base, fingerprint(graph, update.site))
        return Report(tuple(sites), _figures({name: k for name, k in kept.items() if k is not None}))


NONE = Kept(0, 0, 0, 0)


def _figures(merged: dict[str, Merged]) -> dict[str, float | int | str]:
    """What the report says; nothing of a plan."""
    if not merged:
        return {}
    kept = {name: one.kept for name, one in merged.items()}
    total = sum(kept.values(), NONE)
    trained = {name: k for name, k in kept.items() if k.update}
    figures: dict[str, float | int | str] = {
        "lora/survived": round(total.survived, 6),
        "update_over_weight": round(total.size, 6),
        "rounding_over_update": round(total.rounding, 6),
        "untrained_linears": len(kept) - len(trained),
    }
    if trained:
        worst = min(trained, key=lambda name: trained[name].survived)
        figures |= {"worst_survived": round(trained[worst].survived, 6), "worst_linear": worst}
    return figures | _of_lut({name: one for name, one in merged.items() if one.kept_scales is not None})


def _of_lut(merged: dict[str, Merged]) -> dict[str, float | int | str]:
    """What survived with the scales kept, and how much in each LUT weight."""
    if not merged:
        return {}
    kept_scales = sum((one.kept_scales for one in merged.values() if one.kept_scales is not None), NONE)
    by_site = {f"survived/{name}": round(one.kept.survived, 6) for name, one in merged.items()}
    return {"survived_with_scales_kept": round(kept_scales.survived, 6), **by_site}
