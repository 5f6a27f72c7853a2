"""Make a base worse while it trains what is beside it, less and less, and not at all in the end.

    before    x = add(h, mlp)
              n = qc.rms_norm(x, …)
    after     x = add(h, mlp)
              x/degraded = qc.degrade(x, 0.1, 0.3, training, progress, 0.8, linear)
              n = qc.rms_norm(x/degraded, …)

Noise is relative to the root mean square of each token, for the residual stream grows with depth. It fades with
``progress``, an input that training sets to the share of its steps that is done; in evaluation there is none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import fx

from graph import Graph, QcError, raise_all
from graph.lora_sets import training_input
from graph.sites import node_name, set_tag, tag
from passes.base import Pass, Report, TrainingOnly

PROGRESS = "progress"
"""The input with the share of a training that is done; 1, and no noise, where nothing gives it."""


@dataclass(frozen=True, kw_only=True)
class Degrade(Pass):
    """Put noise and dropout on what each selected block gives to the next."""

    contract = TrainingOnly()
    idempotent = False

    sigma: float = 0.1
    """Noise at first, in shares of the root mean square of a token."""

    p: float = 0.3
    """Share that is dropped at first."""

    anneal: Literal["linear", "cosine", "none"] = "linear"
    """How both fall."""

    until: float = 0.8
    """The share of the training after which nothing is left of them."""

    def __post_init__(self) -> None:
        raise_all(list(self._mistakes()))

    def _mistakes(self) -> Iterator[QcError]:
        if self.sigma < 0:
            yield QcError(f"sigma is {self.sigma:g}", fix="give a number from 0; 0.1 is usual")
        if not 0 <= self.p < 1:
            yield QcError(f"p is {self.p:g}", fix="give a share from 0 to below 1; 0.3 is usual")
        if self.sigma == self.p == 0:
            yield QcError("sigma and p are both 0, which changes nothing", fix="give one of them, or take degrade out")
        if not 0 < self.until < 1:
            yield QcError(
                f"until is {self.until:g}", fix="give a share above 0 and below 1, so that training ends without"
            )

    def check(self, graph: Graph) -> Sequence[QcError]:
        """Blocks that are degraded already, and a selection without any."""
        blocks = self._blocks(graph)
        done = [node for node in blocks if any(tag(user, "role") == "degrade" for user in node.users)]
        if done:
            return [QcError(f"{node_name(done[0])} is degraded already", fix="take one of the two degrade out")]
        return []

    def _blocks(self, graph: Graph) -> list[fx.Node]:
        sites = [site for site in graph.sites() if site.role == "block_out"]
        return [site.node for site in self.select.pick(sites, graph.blocks, what="block")]

    def run(self, graph: Graph) -> Report:
        """Insert it behind each block; gated cross-attention there reads the degraded stream."""
        raise_all(list(self.check(graph)))
        found = next((n for n in graph.module.graph.nodes if n.op == "placeholder" and n.target == PROGRESS), None)
        training, blocks = training_input(graph), self._blocks(graph)
        progress = found or graph.add_input(PROGRESS, 1.0, default=1.0)
        for x in blocks:
            readers = list(x.users)
            options = (self.sigma, self.p, training, progress, self.until, self.anneal)
            name = f"{node_name(x)}/degraded"
            worse = graph.insert("qc.degrade", x, *options, name=name, before=x.next, role="degrade")
            set_tag(worse, **{key: tag(x, key) for key in ("block", "stack", "path")})
            for reader in readers:
                reader.replace_input_with(x, worse)
        return Report(tuple(node_name(x) for x in blocks), {"blocks": len(blocks)})
