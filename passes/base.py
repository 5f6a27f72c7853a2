"""What a pass is: a frozen dataclass whose fields are its recipe options, and the contract it declares."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from graph import Graph, QcError, Selector, Site


@dataclass(frozen=True)
class Exact:
    """Outputs are bit-identical afterwards."""


@dataclass(frozen=True)
class Close:
    """Outputs agree within a tolerance, as in ``torch.testing.assert_close``."""

    atol: float = 1e-5
    rtol: float = 1e-5


@dataclass(frozen=True)
class Lossy:
    """Outputs may move, but no further than this, and every selected site is rewritten with finite values."""

    min_psnr_db: float = 20.0
    """Of the outputs on probe inputs, against the graph before the pass."""

    min_weight_snr_db: float = 3.0
    """Of every rewritten weight, against the weight before the pass."""


@dataclass(frozen=True)
class TrainingOnly:
    """Outputs in evaluation mode are bit-identical; only training differs."""


Contract = Exact | Close | Lossy | TrainingOnly


@dataclass(frozen=True)
class Weighed:
    """A weight that a pass could have packed, what that would cost, and whether it stays as it is."""

    weight: str
    error: float | None
    """The share of its linear's outputs that packing loses; None where nothing had to be, or could be, measured."""

    values: int
    kept: bool


@dataclass(frozen=True)
class Report:
    """What a pass did; it goes into the manifest."""

    changed: tuple[str, ...]
    """The sites it rewrote."""

    figures: dict[str, float | int | str] = field(default_factory=dict)
    """What it measured on the way, under names a reader understands."""

    weighed: tuple[Weighed, ...] = ()
    """The weights among which it chose some to stay as they are; none if it packs whatever is selected."""


ReadText = Callable[[Any, int, int, int], Iterable[Mapping[str, Tensor]]]
"""Given data, tokens, tokens a row and rows a batch: batches of inputs of a causal language model."""

EVERYTHING = Selector()

BLOCK_WEIGHTS = Selector(role=("attn.*", "mlp.*"))
"""The linears of attention and MLP."""


@dataclass(frozen=True, kw_only=True)
class Pass(ABC):
    """A rewrite of a graph, and its options.

    The fields are the options a recipe may set, each with a docstring. A pass keeps no state: all it learns
    becomes a node or a tensor of the graph. It works on a graph of ``meta`` tensors too (``qc check`` and
    ``qc show`` run it that way), so it decides by shapes and dtypes and never by values.
    """

    contract: ClassVar[Contract]
    """What the pass preserves. The runner holds it to that."""

    ops: ClassVar[tuple[str, ...]] = ()
    """The ops whose sites are offered to ``rewrite``: ``("aten.linear",)``."""

    idempotent: ClassVar[bool] = True
    """Whether a second run finds nothing to do."""

    after: ClassVar[tuple[str, ...]] = ()
    """Passes that may not come later in a recipe than this one."""

    links: ClassVar[bool] = False
    """Whether it makes one graph of several, by ``link``, instead of rewriting one."""

    new_outputs: ClassVar[bool] = False
    """Whether the graph returns other values afterwards, which come of those it returned."""

    select: Selector = EVERYTHING
    """Which of the offered sites to rewrite."""

    def rewrite(self, graph: Graph, site: Site) -> bool:
        """Rewrite the graph at ``site``; False if there was nothing to do."""
        raise NotImplementedError(f"{type(self).__name__} has neither rewrite() nor run()")

    def run(self, graph: Graph) -> Report:
        """Rewrite all of the graph. The default offers every selected site to ``rewrite``."""
        changed = []
        for site in self.select.pick(graph.sites(*self.ops), graph.blocks):
            try:
                if self.rewrite(graph, site):
                    changed.append(site.name)
            except QcError as error:
                error.site = error.site or site.name
                raise
        return Report(tuple(changed))

    def link(self, graphs: Mapping[str, Graph]) -> tuple[Graph, Report]:
        """One graph of several; for passes that say so with ``links``."""
        raise NotImplementedError(f"{type(self).__name__} has no link()")

    def check(self, graph: Graph) -> Sequence[QcError]:
        """All mistakes that shapes show, without weights. The default has none to report."""
        return ()

    def reading(self, read: ReadText) -> Pass:
        """The pass, able to read text; the same one where it needs none."""
        return self

    def knowing(self, models: Mapping[str, str]) -> Pass:
        """The pass, told which models the recipe names, by their names; the same one where it does not matter."""
        return self

    @classmethod
    def options(cls) -> dict[str, Any]:
        """The option names and their defaults (no default: ``...``)."""
        import dataclasses

        return {f.name: f.default if f.default is not dataclasses.MISSING else ... for f in dataclasses.fields(cls)}
