"""Put other weights in the place of packed ones: those they were packed from, or those they unpack to.

    before    W/dequantize = qc.dequantize_4bit(W.indices, W.absmax, nf4, model)
              y = linear(x, W/dequantize)
    after     y = linear(x, W)

LoRA beside a weight stays as it was trained, and belongs to the new weight then: ``merge-lora`` merges it there. With
``to: dequantized`` the graph computes what was trained. With ``to: full`` it computes something else, better or worse:
LoRA may have learned to undo what packing did. Every weight is compared with the packed one before it takes its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from graph import Graph, QcError, Site, TensorInfo
from graph.checkpoint import open_checkpoint, packing_of
from graph.formats import dense_value, rounded, store_dense, weight_name
from graph.formats.stored import DEQUANTIZE
from graph.joint import home_of
from graph.lora_base import fingerprint
from graph.lora_merge import likeness
from graph.lora_sets import updates
from graph.weights import Stored
from passes.base import Exact, Lossy, Pass, Report


@dataclass(frozen=True, kw_only=True)
class SwapBase(Pass):
    """Store a float weight in the place of each selected packed one, and leave what was trained beside it."""

    contract = Exact()
    ops = DEQUANTIZE
    idempotent = False  # a second run has nothing to select, and says so

    models: ClassVar[Mapping[str, str]] = {}
    """The models of the recipe, by name."""

    to: Literal["full", "dequantized"] = "dequantized"
    """The float weights that were packed, or what the packed ones stand for."""

    base: str | None = field(default=None, metadata={"path": True})
    """For to: full, the folder with the float weights; without it, the models that the recipe names."""

    force_base: bool = False
    """Take a weight even where packing it would not give the packed one."""

    def __post_init__(self) -> None:
        if self.base is not None and self.to != "full":
            raise QcError("base is given, but to: dequantized does not read it", fix="take base out, or set to: full")
        if self.to == "full":
            object.__setattr__(self, "contract", Lossy(min_psnr_db=10.0, min_weight_snr_db=0.0))

    def knowing(self, models: Mapping[str, str]) -> Pass:
        """The pass, with where the float weights lie."""
        made = replace(self)
        object.__setattr__(made, "models", models)
        return made

    def check(self, graph: Graph) -> Sequence[QcError]:
        """Weights whose model nothing names."""
        homes = {home_of(graph, weight_name(site))[0] for site in self._chosen(graph)} if self.to == "full" else set()
        lost = [home for home in homes if self._folder(home) is None]
        if not lost:
            return [
                error for folder in sorted({str(self._folder(home)) for home in homes}) for error in _packed(folder)
            ]
        whose = f"of {lost[0]} " if lost[0] else ""
        what = f"where the float weights {whose}lie is not known"
        return [QcError(what, fix="set base to the model's folder, or run it from the recipe that names the models")]

    def run(self, graph: Graph) -> Report:
        """Swap one weight after the other; what is known of LoRA's base follows."""
        for error in self.check(graph):
            raise error
        sites = self._chosen(graph)
        stored = self._stored(graph, sites) if self.to == "full" else {}
        readers = _readers(graph, sites)
        moved = 0.0
        for site in sites:
            value = self._value(graph, site, stored.get(site.name))
            if not value.is_meta:
                moved = max(moved, _relative(dense_value(graph, site, torch.float32), value))
            store_dense(graph, site, value.to(site.value.dtype))
        linears = {reader.name for found in readers.values() for reader in found}
        for update in updates(graph):
            if update.site.name in linears:
                graph.set_tensor(update.base, fingerprint(graph, update.site))
        return Report((*readers, *sorted(linears)), {"weights": len(sites), "moved_most": round(moved, 6)})

    def _chosen(self, graph: Graph) -> list[Site]:
        return self.select.pick(graph.sites(*self.ops), graph.blocks, what="packed weight")

    def _folder(self, home: str) -> str | None:
        return self.base if self.base is not None else self.models.get(home)

    def _stored(self, graph: Graph, sites: Sequence[Site]) -> dict[str, Stored]:
        """Where the float weight of each site lies."""
        if any(graph.tensor(name).is_meta for site in sites for name in site.tensors() if name not in graph.stored):
            return {}  # of a plan nothing is read
        homes: dict[str, dict[str, Site]] = {}
        for site in sites:
            home, name = home_of(graph, weight_name(site))
            homes.setdefault(home, {})[name] = site
        found: dict[str, Stored] = {}
        for home, named in homes.items():
            folder = self._folder(home)
            assert folder is not None
            places = _bind(graph, folder, named)
            found |= {site.name: places[name] for name, site in named.items()}
        return found

    def _value(self, graph: Graph, site: Site, stored: Stored | None) -> Tensor:
        if stored is None:
            return dense_value(graph, site)
        weight = stored.load().to(graph.device, graph.dtype)
        same, least, what = likeness(graph, site, weight)
        if same < least and not self.force_base:
            told = f"{stored.key} in {Path(stored.file).name} is not what {weight_name(site)} was packed from"
            fix = "set base to the checkpoint that was quantized, or force_base to true if you know better"
            raise QcError(f"{told}: {same:.0%} of the {what} agree", fix=fix, site=site.name)
        return rounded(weight, site.value.dtype, weight_name(site))


def _readers(graph: Graph, sites: Sequence[Site]) -> dict[str, list[Site]]:
    """The linears that read what each of ``sites`` unpacks, by its name."""
    linears: dict[str, list[Site]] = {}
    for linear in graph.sites("aten.linear"):
        for weight in _dense(linear):
            linears.setdefault(weight, []).append(linear)
    return {site.name: linears.get(weight_name(site), []) for site in sites}


def _packed(folder: str) -> Iterator[QcError]:
    """What is wrong with a folder whose weights are packed."""
    method = packing_of(folder)
    if method is not None:
        what = f"{folder} holds its weights packed ({method}), and to: full wants the floats that were"
        fix = "set base to the folder of the model before it was quantized, or to: dequantized"
        yield QcError(what, fix=fix)


def _bind(graph: Graph, folder: str, named: Mapping[str, Site]) -> dict[str, Stored]:
    """Where the weights of ``named`` lie in the checkpoint ``folder``, by the names they have there."""
    tensors = {name: torch.empty(site.value.shape, device="meta") for name, site in named.items()}
    infos = {}
    for name, site in named.items():
        side = graph.info(str(site.input(0).target))
        aliases = tuple(home_of(graph, alias.removesuffix(".indices"))[1] for alias in side.aliases)
        infos[name] = TensorInfo(transposed=side.transposed, aliases=aliases)
    nodes = fx.Graph()
    nodes.output(None)
    return open_checkpoint(folder).bind(Graph(nodes, tensors, infos))


def _dense(linear: Site) -> set[str]:
    """The names that the weights which ``linear`` reads have when they are dense."""
    found, pending = set(), [linear.input(1)]
    while pending:
        node = pending.pop()
        if node.op == "call_function":
            one = Site(linear.graph, node)
            found |= {weight_name(one)} if one.op in DEQUANTIZE else set()
            pending += node.all_input_nodes
    return found


def _relative(old: Tensor, new: Tensor) -> float:
    """How far apart two weights are, over the size of the first."""
    return float((new.float() - old).norm() / old.norm().clamp(min=1e-30))
