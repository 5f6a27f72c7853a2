"""Say what trains.

    before    W: trainable=False
    after     W: trainable=True, group="norms"

Nodes and values stay; only what is known of the tensors changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

from graph import Graph, QcError, Selector, raise_all
from graph.formats import packed_sites
from passes.base import Exact, Pass, Report

NOTHING = Selector(name=(), allow_empty=True)


@dataclass(frozen=True, kw_only=True)
class SetTrainable(Pass):
    """Train the tensors that are selected or in a group, and freeze all others.

    Selectors go over tensors here, by their own names; their roles are those of the ops that read them.
    """

    contract = Exact()

    select: Selector = NOTHING
    """Tensors to train in the group that they are in, if they are in one."""

    groups: dict[str, Selector] = field(default_factory=dict)
    """Tensors to train under a group's name, by which ``train.groups`` sets learning rates and the rest."""

    freeze_rest: bool = True
    """Freeze every tensor that is not named here; without it, those keep training."""

    def check(self, graph: Graph) -> Sequence[QcError]:
        """Selectors that match nothing, packed integers, and tensors in two groups."""
        return self._assign(graph)[1]

    def run(self, graph: Graph) -> Report:
        """Set the flags; the report names the tensors whose flags changed."""
        wanted, errors = self._assign(graph)
        raise_all(errors)
        changed = []
        for name, info in graph.tensors().items():
            trainable = name in wanted or (info.trainable and not self.freeze_rest)
            group = wanted.get(name) or (info.group if trainable else None)
            if (trainable, group) != (info.trainable, info.group):
                graph.set_info(name, trainable=trainable, group=group)
                changed.append(name)
        trained = [name for name, info in graph.tensors().items() if info.trainable]
        astray = sorted(set(trained) ^ set(wanted)) if self.freeze_rest else []
        assert not astray, f"the trainable set is not the declared one, see {astray[0]}"
        values = sum(prod(graph.shape(name)) for name in trained)
        return Report(tuple(changed), {"trainable_tensors": len(trained), "trainable_values": values})

    def _assign(self, graph: Graph) -> tuple[dict[str, str | None], list[QcError]]:
        """The tensors to train, each with its group, and everything that is wrong with the selectors."""
        sides = {tensor for site in packed_sites(graph) for tensor in site.tensors()}
        packed = {tensor for tensor in sides if graph.info(tensor).kind == "buffer"}
        offered = [t for t in graph.named_tensors() if t.info.kind == "parameter" or t.name in packed]
        wanted: dict[str, str | None] = {}
        errors: list[QcError] = []
        selectors: list[tuple[str | None, Selector]] = [(None, self.select), *self.groups.items()]
        for group, selector in selectors:
            try:
                picked = selector.pick(offered, graph.blocks, what="tensor")
            except QcError as error:
                error.what = error.what if group is None else f"group {group!r}: {error.what}"
                errors.append(error)
                continue
            errors += _not_trainable([t.name for t in picked if t.name in packed], graph)
            errors += _sorted_by([t.name for t in picked], graph)
            errors += [_in_two(t.name, wanted[t.name], group) for t in picked if wanted.get(t.name) is not None]
            wanted |= {t.name: group for t in picked}
        return wanted, errors


def _not_trainable(packed: list[str], graph: Graph) -> list[QcError]:
    if not packed:
        return []
    others = f" and {len(packed) - 1} more are" if len(packed) > 1 else " is"
    lut = all(name.removesuffix("indices") + "lut" in graph.tensors() for name in packed)
    fix = f"run dequantize first, or exclude '{'*.indices' if lut else '*.weight.*'}'"
    return [QcError(f"{packed[0]}{others} part of a packed weight, which cannot train", fix=fix)]


def _sorted_by(picked: list[str], graph: Graph) -> list[QcError]:
    """Levels by which latent weights are sorted at every step, so that they have to stay in order."""
    latent = {tensor for site in graph.sites("qc.fake_quantize_lut") for tensor in site.tensors()}
    wrong = [name for name in picked if name in latent and name.endswith(".lut")]
    what = "{} holds levels that latent weights are sorted by, and trained freely they do not stay in order"
    fix = "set lut.train to levels and lut.symmetric to true in quantize-base, or freeze-q first"
    return [QcError(what.format(name), fix=fix) for name in wrong[:1]]


def _in_two(name: str, first: str | None, second: str | None) -> QcError:
    return QcError(f"{name} is in the groups {first!r} and {second!r}", fix="let one of them exclude it")
