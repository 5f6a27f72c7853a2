"""Named sets of LoRA in a graph: putting one beside a linear, finding them, taking them out again.

    before    up = linear(x, W)
    after     up = linear(x, W)
              up/lora.default = qc.lora(up, x, up.lora_A.default.weight, up.lora_B.default.weight, 16)

Tensors are named as PEFT names them. Beside them lies ``up.lora_base.default``, the sha256 of the weight that the set
was put on: an update means something on that weight only.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from graph.core import Graph, TensorInfo
from graph.errors import QcError
from graph.lora import merged, row_norms, scale_of
from graph.lora_base import base_weight, fingerprint, has_values, in_out
from graph.ops import op_name
from graph.sites import Site, set_tag, tag

TRAINING = "training"
"""The input of the graph that turns dropout on."""

_A = re.compile(r"(.+)\.lora_A\.([^.]+)\.weight")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What one set is at one linear."""

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False

    @property
    def scale(self) -> float:
        return scale_of(self.alpha, self.rank, self.rslora)


@dataclass(frozen=True)
class Update:
    """One set at one linear of a graph."""

    site: Site
    """The linear."""

    set: str
    node: fx.Node
    """The ``qc.lora``."""

    @property
    def module(self) -> str:
        return module_path(self.site)

    @property
    def a(self) -> str:
        return f"{self.module}.lora_A.{self.set}.weight"

    @property
    def b(self) -> str:
        return f"{self.module}.lora_B.{self.set}.weight"

    @property
    def magnitude(self) -> str | None:
        """The name of DoRA's magnitudes; None where it has none."""
        name = f"{self.module}.lora_magnitude_vector.{self.set}.weight"
        return name if name in self.site.graph.tensors() else None

    @property
    def base(self) -> str:
        """The name of the sha256 of the weight it was put on."""
        return f"{self.module}.lora_base.{self.set}"

    @property
    def tensors(self) -> list[str]:
        """All its tensors."""
        return [name for name in (self.a, self.b, self.magnitude, self.base) if name is not None]

    @cached_property
    def shape(self) -> Shape:
        """Its rank, its scaling and the rest, as the graph has them."""
        x, alpha, rslora = self.node.args[1], self.node.args[4], self.node.args[5:] == (True,)
        assert isinstance(x, fx.Node) and isinstance(alpha, float)
        dropout = 0.0 if x is self.site.input(0) else x.args[1]
        assert isinstance(dropout, float)
        rank = self.site.graph.shape(self.a)[0]
        return Shape(rank=rank, alpha=alpha, dropout=dropout, rslora=rslora, dora=self.magnitude is not None)

    @property
    def last(self) -> fx.Node:
        """The node that gives the linear's output with this set in it."""
        if self.magnitude is None:
            return self.node
        return next(user for user in self.node.users if op_name(user.target) == "qc.dora")

    def merged(self, weight: Tensor) -> Tensor:
        """``weight`` [out, in] with this set in it, in fp32."""
        graph, magnitude = self.site.graph, self.magnitude
        m = None if magnitude is None else graph.tensor(magnitude)
        with torch.no_grad():
            return merged(weight, graph.tensor(self.a), graph.tensor(self.b), m, self.shape.scale)


def module_path(site: Site) -> str:
    """The module whose parts the tensors of a site are; an op that is not alone in one gets a place of its own."""
    return site.name.replace("/", ".")


def updates(graph: Graph, sets: Sequence[str] | None = None) -> list[Update]:
    """Every set at every linear, in the order in which they add up; of the named sets, or all."""
    found = []
    for site in graph.sites("qc.lora", "qc.lora_in_place"):
        name = _A.fullmatch(str(site.input(2).target))
        assert name is not None, f"{site.name} reads no LoRA tensor"
        linear = site.input(0)
        while op_name(linear.target) in ("qc.lora", "qc.lora_in_place", "qc.dora"):
            linear = linear.all_input_nodes[0]
        if sets is None or name[2] in sets:
            found.append(Update(Site(graph, linear), name[2], site.node))
    return found


def set_names(graph: Graph) -> list[str]:
    """The names of all sets."""
    return list(dict.fromkeys(update.set for update in updates(graph)))


def conflicts(graph: Graph, name: str, plans: Sequence[tuple[Site, Shape]]) -> list[QcError]:
    """Why the set ``name`` cannot be put beside these linears."""
    here: dict[str, list[str]] = {}
    for update in updates(graph):
        here.setdefault(update.site.name, []).append(update.set)
    found = []
    for site, shape in plans:
        if name in here.get(site.name, []):
            found.append(
                QcError(f"set {name!r} is at {site.name} already", fix="give the new one another set", site=site.name)
            )
        elif shape.dora and site.name in here:
            what = f"DoRA scales the plain linear, and set {here[site.name][0]!r} is at {site.name} already"
            found.append(QcError(what, fix="add the DoRA set before the others", site=site.name))
    return found


# -- putting in -----------------------------------------------------------------------------------------------------


def attach(graph: Graph, site: Site, name: str, shape: Shape, values: dict[str, Tensor], *, pinned: bool) -> None:
    """Put the set ``name`` beside the linear ``site``.

    ``values`` holds ``a`` [r, in], ``b`` [out, r] and, for DoRA, ``m`` [out]; with ``pinned`` they keep their dtype
    when the graph changes its own, as the magnitudes always do.
    """
    assert ("m" in values) == shape.dora, "magnitudes belong to DoRA"
    linear, module, x = site.node, module_path(site), site.input(0)
    y = end = _end(linear)
    before, users = y.next, list(y.users)
    info = TensorInfo(trainable=True, group=f"lora.{name}", block=site.block, stack=site.stack, pinned=pinned)

    def insert(op: str, *args: Any, part: str = "", role: str = "lora.update") -> fx.Node:
        node = graph.insert(op, *args, name=f"{site.name}/lora.{name}{part}", before=before, role=role)
        set_tag(node, **{key: tag(linear, key) for key in ("block", "stack", "path")})
        return node

    if shape.dropout:
        x = insert("qc.dropout", x, shape.dropout, training_input(graph), part=".dropout", role="lora.dropout")
    a = graph.add_tensor(
        f"{module}.lora_A.{name}.weight", values["a"], before=before, info=replace(info, role="lora.a")
    )
    b = graph.add_tensor(
        f"{module}.lora_B.{name}.weight", values["b"], before=before, info=replace(info, role="lora.b")
    )
    scaling = (float(shape.alpha), True) if shape.rslora else (float(shape.alpha),)
    end = insert("qc.lora", y, x, a, b, *scaling)
    if shape.dora:
        at = f"{module}.lora_magnitude_vector.{name}.weight"
        m = graph.add_tensor(at, values["m"], before=before, info=replace(info, role="lora.m", pinned=True))
        factor = insert("qc.dora_factor", linear.args[1], a, b, m, *scaling, part=".factor", role="lora.factor")
        end = insert("qc.dora", end, factor, *linear.args[2:3], part=".dora")
    for user in users:
        user.replace_input_with(y, end)
    record = TensorInfo(kind="buffer", role="lora.base", block=site.block, stack=site.stack, pinned=True)
    graph.add_tensor(f"{module}.lora_base.{name}", fingerprint(graph, site), before=before, info=record)


def _end(linear: fx.Node) -> fx.Node:
    """The node that gives a linear's output with all its sets."""
    end = linear
    while True:
        following = [
            u
            for u in end.users
            if u.op == "call_function" and op_name(u.target) in ("qc.lora", "qc.dora") and u.args[0] is end
        ]
        if not following:
            return end
        end = following[0]


def training_input(graph: Graph) -> fx.Node:
    """The input that turns dropout on, added where there is none."""
    found = next((n for n in graph.module.graph.nodes if n.op == "placeholder" and n.target == TRAINING), None)
    return found or graph.add_input(TRAINING, False, default=False)


def initial(graph: Graph, site: Site, shape: Shape, *, kind: str, seed: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Values with which a new set changes nothing: A random, B zero, DoRA's magnitudes the norms of the weight's rows.

    ``kind`` is ``kaiming``, uniform within ``1 / sqrt(in)`` as in PEFT, or ``gaussian``, with deviation ``1 / r``. The
    numbers depend on ``seed`` alone, not on what was drawn before. Of a plan: shapes without values.
    """
    inputs, out = in_out(site)
    if not has_values(graph, site):
        sizes = {"a": (shape.rank, inputs), "b": (out, shape.rank)} | ({"m": (out,)} if shape.dora else {})
        return {key: torch.empty(size, dtype=dtype, device="meta") for key, size in sizes.items()}
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big") >> 1)
    a = torch.empty(shape.rank, inputs)
    if kind == "kaiming":
        a.uniform_(-1 / math.sqrt(inputs), 1 / math.sqrt(inputs), generator=generator)
    else:
        a.normal_(0, 1 / shape.rank, generator=generator)
    found = {"a": a.to(graph.device, dtype), "b": torch.zeros(out, shape.rank, dtype=dtype, device=graph.device)}
    if shape.dora:
        found["m"] = row_norms(base_weight(graph, site), found["a"], found["b"], shape.scale)
    return found


# -- taking out -----------------------------------------------------------------------------------------------------


def detach(graph: Graph, found: Sequence[Update]) -> None:
    """Take sets out of a graph: their ops, their tensors, and the ``training`` input if nothing else asks for it."""
    doomed = [name for update in found for name in update.tensors]
    for update in found:
        y = update.node.args[0]
        assert isinstance(y, fx.Node)
        update.last.replace_all_uses_with(y)
    graph.module.graph.eliminate_dead_code()
    for name in doomed:
        graph.remove_tensor(name)
        _prune(graph, name)
    for node in [n for n in graph.module.graph.nodes if n.op == "placeholder" and n.target == TRAINING and not n.users]:
        graph.module.graph.erase_node(node)
    graph.module.recompile()


def _prune(graph: Graph, name: str) -> None:
    """Remove the modules that only held the tensor ``name``."""
    path = name.rpartition(".")[0]
    while path:
        module = graph.module.get_submodule(path)
        if module._modules or module._parameters or module._buffers:
            return
        graph.module.delete_submodule(path)
        path = path.rpartition(".")[0]
