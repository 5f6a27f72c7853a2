"""Make the residual stream smaller, so that it fits fp16.

    before    x = embedding(E, ids)        n = qc.rms_norm(x, N, 1e-06)            y = x + linear(h, W)
    after     x = embedding(E, ids) * f    n = qc.rms_norm(x, N, 1e-06 * f²)       y = x + linear(h, W * f)

Norms take the factor out again, so outputs stay the same bits where it is a power of two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from graph import Graph, QcError, Site, raise_all
from graph.ops import op_name
from graph.sites import node_name
from passes.base import Close, Pass, Report

EPS = {"qc.rms_norm": 2, "aten.layer_norm": 4}
"""The argument of a norm that is added to the mean square."""


@dataclass(frozen=True, kw_only=True)
class ScaleResidual(Pass):
    """Multiply the residual stream, from the embedding to the last norm, by a power of two."""

    contract = Close(atol=0.0, rtol=0.0)  # weights move, and what is computed does not
    idempotent = False  # each run scales once more

    factor: float = 0.25
    """What it is multiplied by: 0.5, 0.25 and so on."""

    def check(self, graph: Graph) -> Sequence[QcError]:
        """Factors that would round, and streams that something but a norm reads."""
        if not (self.factor > 0 and math.frexp(self.factor)[0] == 0.5):
            return [QcError(f"factor {self.factor:g} is no power of two", fix="write 0.5, 0.25, 0.125 …")]
        return self._trace(graph)[2]

    def run(self, graph: Graph) -> Report:
        """Scale what writes to the stream, and what norms add to its mean square."""
        writers, norms, errors = self._trace(graph)
        raise_all(errors)
        changed, seen = [], set()
        for site in writers:
            if site.op == "aten.embedding":
                users = list(site.node.users)
                scaled = graph.insert(
                    "aten.mul.Tensor", site.node, self.factor, name=f"{site.name}/scale", before=site.node.next
                )
                for user in users:
                    user.replace_input_with(site.node, scaled)
                changed.append(site.name)
                continue
            for arg in site.node.args[1:]:
                if isinstance(arg, fx.Node) and str(arg.target) not in seen:
                    seen.add(str(arg.target))
                    value = graph.tensor(str(arg.target))
                    if not value.is_meta:
                        graph.set_tensor(str(arg.target), value.detach() * self.factor)
            changed.append(site.name)
        for site in norms:
            eps = site.node.args[EPS[site.op]]
            assert isinstance(eps, float)
            site.node.update_arg(EPS[site.op], eps * self.factor**2)
            changed.append(site.name)
        return Report(tuple(changed), {"writers": len(writers), "norms": len(norms)})

    def _trace(self, graph: Graph) -> tuple[list[Site], list[Site], list[QcError]]:
        """What writes to the residual stream, the norms that read it, and what is in the way."""
        starts = [site for site in graph.sites("aten.embedding") if site.role == "embed"][:1]
        writers, norms, errors = list(starts), [], []
        stream = {site.node for site in starts}
        for site in graph.sites():
            inside = [arg for arg in site.node.all_input_nodes if arg in stream]
            if not inside:
                continue
            if site.op == "aten.add.Tensor":
                stream.add(site.node)
                for arg in site.node.all_input_nodes:
                    if arg in stream:
                        continue
                    writer = Site(graph, arg)
                    writers.append(writer)
                    errors += _not_scalable(writer)
            elif site.op in EPS:
                norms.append(site)
            else:
                what = f"{site.name} reads the residual stream, and is no norm"
                errors.append(
                    QcError(what, fix="take scale-residual out: the model cannot be scaled so", site=site.name)
                )
        if not starts or not norms:
            errors.append(QcError("the graph has no residual stream", fix="take scale-residual out"))
        return writers, norms, errors


def _not_scalable(site: Site) -> list[QcError]:
    """Why a factor cannot be put into what is added to the stream."""
    if site.node.op == "call_function" and op_name(site.node.target) == "aten.linear" and site.weight() is not None:
        return []
    what = f"{node_name(site.node)} is added to the residual stream, and is no linear with a stored float weight"
    return [QcError(what, fix="run scale-residual before quantize-base and add-lora", site=node_name(site.node))]
