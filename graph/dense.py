"""The tensors of a model's checkpoint, from a graph that may hold them packed: each dense, under its name, when asked.

A packed weight is what the graph computes from its side tensors, ``….weight.indices`` and the like: the expression
is evaluated for the one weight, so what is written is what the graph multiplies with, whatever the format.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from graph.core import Graph, TensorInfo
from graph.errors import QcError
from graph.probe import evaluate_constant
from graph.sites import Site
from graph.tracing import on_meta

PART = 32 << 20
"""Bytes of a tensor that are held at a time."""


@dataclass(frozen=True)
class Dense:
    """A tensor of the checkpoint, to be computed when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    """Its dtype in the graph."""

    graph: Graph
    node: fx.Node | None
    """The expression of a packed weight; None where the graph holds the tensor itself."""

    transposed: bool
    """The graph has it the other way round."""

    def parts(self) -> list[slice]:
        """The rows to load at a time, of what is too large to be held as a whole; of all else none."""
        row = prod(self.shape[1:]) * self.dtype.itemsize
        if self.node is not None or self.transposed or self.shape[0] * row <= PART:
            return []
        step = max(1, PART // row)
        return [slice(start, min(start + step, self.shape[0])) for start in range(0, self.shape[0], step)]

    def load_rows(self, rows: slice) -> Tensor:
        """Some rows of its value; it has ``parts``."""
        return self.graph.rows(self.name, rows.start, rows.stop)

    def load(self) -> Tensor:
        """Its value, in the shape of the checkpoint."""
        value = self.graph.tensor(self.name) if self.node is None else evaluate_constant(self.graph, self.node)
        return value.t().contiguous() if self.transposed else value


def checkpoint_tensors(graph: Graph, beside: Collection[str] = ()) -> tuple[list[Dense], list[QcError]]:
    """Every tensor that a checkpoint of the graph's architecture has, and what stands in the way of writing it.

    Tensors ``beside`` it are written elsewhere, and in nobody's way.
    """
    infos, model = graph.tensors(), _model(graph)
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    prefix = f"{model.base_model_prefix}."
    if graph.kind != "causal-lm" and any(
        name.startswith(prefix) for name in infos
    ):  # a language model without its head
        wanted = {f"{prefix}{name}": shape for name, shape in wanted.items()}
    aliases = {alias for info in infos.values() for alias in info.aliases}
    packed = dict(_packed(graph, wanted))
    found, missing = [], []
    for name, shape in wanted.items():
        if name in infos:
            found.append(_of(graph, name, shape, None))
        elif name in packed:
            found.append(_of(graph, name, shape, packed[name]))
        elif not any(alias == name or alias.startswith(f"{name}.") for alias in aliases):
            missing.append(name)
    errors = [
        error
        for error in (_unmerged(graph), _missing(missing), _foreign(graph, set(wanted) | set(beside), packed))
        if error
    ]
    return found, errors


def model_config(graph: Graph) -> Any:
    """The transformers configuration of the graph."""
    from transformers import AutoConfig

    if "model_type" not in graph.config:
        raise QcError(
            "the graph is not that of a transformers model", fix="capture one: a plain module has no checkpoint"
        )
    dropped = ("model_type", "quantization_config")  # what is written is dense
    rest = {k: v for k, v in graph.config.items() if k not in dropped and not k.startswith("_")}
    return AutoConfig.for_model(graph.config["model_type"], **rest)


def _model(graph: Graph) -> Any:
    assert graph.kind in ("causal-lm", "encoder")
    return on_meta(model_config(graph), "causal-lm" if graph.kind == "causal-lm" else "encoder", torch.float32)


def _of(graph: Graph, name: str, shape: tuple[int, ...], node: fx.Node | None) -> Dense:
    if node is None:
        have, dtype, turned = graph.shape(name), graph.dtype_of(name), graph.info(name).transposed
    else:
        value = node.meta["val"]
        have, dtype = tuple(value.shape), value.dtype
        turned = any(graph.info(side).transposed for side in Site(graph, node).tensors())
    assert (have[::-1] if turned else have) == shape, f"{name} is {list(have)}, its checkpoint has {list(shape)}"
    return Dense(name, shape, dtype, graph, node, turned)


def _packed(graph: Graph, wanted: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, fx.Node]]:
    """The name of each packed weight, and the outermost expression on nothing but its side tensors."""
    constants = constant_nodes(graph)
    for node in constants:
        if node.op != "call_function" or all(user in constants for user in node.users):
            continue
        sides = Site(graph, node).tensors()
        owner = next((name for name in _prefixes(sides[0]) if name in wanted), None) if sides else None
        if owner is not None and all(side.startswith(f"{owner}.") or side.endswith(".latent") for side in sides):
            yield owner, node  # latent weights read each other where they share a scale


def constant_nodes(graph: Graph) -> dict[fx.Node, None]:
    """All values that depend on stored tensors only, in order."""
    found: dict[fx.Node, None] = {}
    for node in graph.module.graph.nodes:
        reads = node.all_input_nodes
        if node.op == "get_attr" or (node.op == "call_function" and reads and all(n in found for n in reads)):
            found[node] = None
    return found


def _prefixes(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _unmerged(graph: Graph) -> QcError | None:
    """LoRA that is still beside its weights."""
    names = [name for name, info in graph.tensors().items() if _is_lora(info)]
    sites = [site.name for site in graph.sites() if site.op.startswith("qc.lora")]
    if not names and not sites:
        return None
    where = sites or names
    return QcError(f"LoRA is not merged at {len(where)} sites", site=where[0], fix="add merge-lora before the export")


def _is_lora(info: TensorInfo) -> bool:
    return info.role.startswith("lora.") or (info.group or "").startswith("lora.")


def _missing(names: list[str]) -> QcError | None:
    if not names:
        return None
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return QcError(
        f"the graph has no {', '.join(names[:3])}{more}",
        fix="a pass took away what the architecture needs; leave it out, or export to another target",
    )


def _foreign(graph: Graph, wanted: set[str], packed: dict[str, fx.Node]) -> QcError | None:
    """Tensors for which the architecture has no place."""
    used = {side for node in packed.values() for side in Site(graph, node).tensors()}
    foreign = [
        name
        for name, info in graph.tensors().items()
        if info.saved and not wanted & {name, *info.aliases} and name not in used and not _is_lora(info)
    ]
    if not foreign:
        return None
    more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
    return QcError(
        f"a {graph.config['model_type']} checkpoint has no place for {', '.join(foreign[:3])}{more}",
        fix="take out, or merge, what a pass added; or export to another target",
    )
