"""Make float weights ternary again, from the scales that they had before ``dequantize``.

    before    y = linear(x, W)                 W_ternary_scale f16[3072, 1] beside W
    after     W/fake_quantize = qc.fake_quantize_ternary(W.latent, model, dead-zone, 0.1, absmean, 1024)
              y = linear(x, W/fake_quantize)   W.latent = W * W_ternary_scale / mean |W|

A scale found anew would shrink each time, by the share of zeros. Rows multiplied so that their mean magnitude is the
scale that they had keep it, and their integers; a few steps of training follow. The report has the error of this
beside that of a scale of least squares and that of the mean found anew, which is the naive way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from graph import Graph, QcError, Site
from graph.formats import TernaryRule
from graph.formats.ternary_again import drop_scale, kept_scale, starts, with_scale
from passes.base import Report
from passes.ternary_ste import TernarySte


@dataclass(frozen=True, kw_only=True)
class RequantizeTernary(TernarySte):
    """Make the selected weights ternary again, each with the scale that it had."""

    start: Literal["stored", "plain"] = "stored"
    """Begin from the scale that each weight had, or from the weights as they are: with `scale: absmean`, the naive
    way."""

    def _mistakes(self) -> Iterator[QcError]:
        yield from super()._mistakes()
        if self.keep is not None:
            what = "keep chooses among weights that were never ternary, and these were"
            yield QcError(what, fix="take keep out, and exclude from select what has stayed as it is")
        if self.start == "stored" and self.scale != "absmean":
            what = "start is stored, and a scale of least-squares would be another"
            yield QcError(what, fix="take scale out, or set start to plain")

    def _problems(self, graph: Graph, site: Site) -> Iterator[QcError]:
        found = list(super()._problems(graph, site))
        yield from found
        weight = site.weight()
        if found or weight is None:
            return
        scale, shape = kept_scale(graph, weight), graph.shape(weight)
        if scale is None:
            what = f"no ternary scale of {weight} is stored"
            yield QcError(what, fix="run ternary-ste, or exclude it from select", site=site.name)
        elif tuple(scale.shape) != self.by(shape[1], 0.1).scale_shape(shape):
            what = f"{weight} had scales {list(scale.shape)}, which granularity {self.granularity} has not"
            yield QcError(what, fix="set granularity to what the weight had", site=site.name)

    def run(self, graph: Graph) -> Report:
        """Compare the ways to begin, then rewrite."""
        weights = {site.weight() for site in self.select.pick(graph.sites(*self.ops), graph.blocks)} - {None}
        _, tau, _ = self._size(graph)
        figures: dict[str, Any] = {}
        for name in sorted(str(weight) for weight in weights):
            w, scale = graph.tensor(name).detach(), kept_scale(graph, name)
            assert scale is not None, f"{name} has no stored scale, see check()"
            if not w.is_meta:
                found = starts(w, scale, self.by(int(w.shape[1]), tau))
                for key, value in vars(found).items():
                    figures[f"worst_error_{key}"] = max(figures.get(f"worst_error_{key}", 0.0), round(value, 5))
        report = super().run(graph)
        return Report(report.changed, {**report.figures, **figures})

    def _start(self, graph: Graph, weight: str, w: Tensor, by: TernaryRule) -> Tensor:
        """The weight with the mean magnitudes that its stored scales are."""
        scale = kept_scale(graph, weight)
        assert scale is not None, f"{weight} has no stored scale, see check()"
        drop_scale(graph, weight)
        return with_scale(w, scale, by) if self.start == "stored" else w
