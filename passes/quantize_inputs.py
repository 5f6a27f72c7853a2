"""Round what linears read as GPU servers do, so that a model trains on the numbers that it is served with.

    before    y = linear(x, W)
    after     x/fp8 = qc.fake_quantize_input(x, fp8, 0)
              y = linear(x/fp8, W)

Gradients go through unchanged. An export to the same numbers takes them as they are: what trained is what is served.
NVFP4 and static FP8 have a scale that is known beforehand; it follows from the largest magnitude on some text:

              x/nvfp4 = qc.fake_quantize_input(x, nvfp4, 16, seen=3.25)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from torch import fx

from graph import Graph, QcError, Selector, Site
from graph.formats.activations import GROUPS, fake_quantize_input
from graph.inputs import largest_inputs
from graph.ops import op_name
from graph.sites import node_name
from passes.base import BLOCK_WEIGHTS, Lossy, Pass, ReadText, Report

OP = "qc.fake_quantize_input"


@dataclass(frozen=True, kw_only=True)
class QuantizeInputs(Pass):
    """Round what the selected linears read to numbers of 8 or 4 bits."""

    contract = Lossy(min_psnr_db=5.0)  # deep random models amplify noise

    read: ClassVar[Any] = None
    """A ``ReadText``, once there is one."""

    select: Selector = BLOCK_WEIGHTS
    """Which linears."""

    scheme: Literal["fp8", "mxfp8", "nvfp4", "mxfp4", "int8"] = "fp8"
    """The numbers: those of the target that is exported to."""

    share: Literal["token", "block", "static"] = "token"
    """What shares a scale: a token, 128 values of it, or everything, by a scale known beforehand. For fp8."""

    data: Any = field(default=None, metadata={"data": True})
    """The text on which ranges are found. For nvfp4, and fp8 with share static."""

    tokens: int = 16384
    """Tokens that are read, in rows of 128."""

    @property
    def calibrated(self) -> bool:
        """Whether something has to be known of the inputs beforehand."""
        return self.scheme == "nvfp4" or self.share == "static"

    @property
    def columns(self) -> int:
        """The values of a token that share a scale; 0: all."""
        return 128 if self.share == "block" else GROUPS.get(self.scheme, 0)

    def reading(self, read: ReadText) -> Pass:
        """The pass, with where its text comes from."""
        made = replace(self)
        object.__setattr__(made, "read", read)
        return made

    def check(self, graph: Graph) -> Sequence[QcError]:
        """Options that do not go together, and inputs that no whole number of groups divides."""
        found = list(self._mistakes())
        try:
            sites = self._sites(graph)
        except QcError as error:
            return [*found, error]
        for site in sites:
            width = int(site.input(0).meta["val"].shape[-1])
            if self.columns and width % self.columns:
                what = f"{self.columns} values share a scale, and {site.name} reads {width}"
                found.append(QcError(what, fix="exclude it from select", site=site.name))
        return found

    def _mistakes(self) -> Iterator[QcError]:
        if self.share != "token" and self.scheme != "fp8":
            yield QcError(f"share is given, and scheme is {self.scheme}", fix="set scheme to fp8, or take share out")
        if self.calibrated and self.data is None:
            which = "nvfp4" if self.scheme == "nvfp4" else "share static"
            yield QcError(f"{which} has scales that are found on text, and no data is given", fix="set data")
        if self.data is not None and not self.calibrated:
            yield QcError(f"data is given, and {self.scheme} finds its scales by itself", fix="take data out")
        if self.tokens < 1:
            yield QcError(f"tokens is {self.tokens}", fix="give a number from 1")

    def _sites(self, graph: Graph) -> list[Site]:
        return self.select.pick(graph.sites("aten.linear"), graph.blocks)

    def run(self, graph: Graph) -> Report:
        """Round each value once, whoever reads it; what is rounded already stays as it is."""
        sites = [site for site in self._sites(graph) if not _is_rounded(site.input(0))]
        seen = self._seen(graph, sites)
        made: dict[fx.Node, fx.Node] = {}
        readers: dict[fx.Node, list[Site]] = {}
        for site in sites:
            readers.setdefault(site.input(0), []).append(site)
        for x, group in readers.items():
            given = {"seen": max(seen[site.name] for site in group)} if seen else {}
            name = f"{node_name(x)}/{self.scheme}"
            made[x] = graph.insert(
                fake_quantize_input,
                x,
                self.scheme,
                self.columns,
                name=name,
                before=group[0].node,
                role="other",
                **given,
            )
        for site in sites:
            site.set_input(0, made[site.input(0)])
        return Report(tuple(site.name for site in sites), {"inputs": len(made)})

    def _seen(self, graph: Graph, sites: Sequence[Site]) -> Mapping[str, float]:
        """The largest magnitude that each linear reads, where that has to be known; of a plan, which has none, 1."""
        if not self.calibrated or not sites:
            return {}
        if any(name not in graph.stored and graph.tensor(name).is_meta for name in graph.tensors()):
            return dict.fromkeys((site.name for site in sites), 1.0)
        if self.read is None:
            raise QcError(
                "quantize-inputs has no text to read", fix="run it from a recipe, or give it text with reading()"
            )
        rows = (batch["input_ids"] for batch in self.read(self.data, self.tokens, 128, 8))
        return largest_inputs(graph, rows, [site.name for site in sites])


def _is_rounded(x: fx.Node) -> bool:
    return x.op == "call_function" and op_name(x.target) == OP
