"""What each op reads, before and after a pass: outside the changed sites nothing may be wired differently.

A pass may put ops of its own between a changed site and its readers, or in the place of an op that is gone.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch._ops import OpOverload

from graph import Graph, Site
from graph.ops import op_name
from graph.sites import is_constant, node_name
from passes.marks import Breach, Snapshot, belongs, mark

OUTPUT = "the output"


@dataclass(frozen=True)
class Wire:
    """An argument that is a value of the graph: what it was, and what it is."""

    reader: str
    argument: str
    old: fx.Node
    new: fx.Node


def wires(before: Graph, after: Graph) -> Iterator[Wire]:
    """The arguments of every op and output that both graphs have."""
    was = {site.name: site.node for site in before.sites()}
    for site in after.sites():
        if site.name in was and op_name(was[site.name].target) == site.op:
            old, new = arguments(was[site.name]), arguments(site.node)
            for place, arg in old.items():
                if isinstance(arg, fx.Node) and isinstance(new.get(place), fx.Node):
                    yield Wire(site.name, title(site.node, place), arg, new[place])
    for one, other in zip(before.output_nodes(), after.output_nodes(), strict=False):
        yield Wire(OUTPUT, "value", one, other)


def rewired(before: Snapshot, after: Graph, changed: Collection[str], lossy: bool) -> Iterator[Breach]:
    """Every op whose arguments are not what they were, though it is not among the ``changed`` sites."""
    yield from _interface(before.graph, after)
    was = {site.name: site for site in before.graph.sites()}
    for site in after.sites():
        if site.name in was:
            yield from _constants(was[site.name], site, changed)
    judge = _Judge(before.graph, after, changed, lossy)
    for wire in wires(before.graph, after):
        yield from judge.breaches(wire)


def idle(before: Snapshot, after: Graph, changed: Collection[str]) -> Iterator[Breach]:
    """Every site or tensor that is said to be changed, and is as it was."""
    was, now = ({site.name: site for site in graph.sites()} for graph in (before.graph, after))
    infos = after.tensors()
    for name in changed:
        known = name in was or name in now or name in before.marks or name in infos
        if not known:
            yield Breach(f"{name} is reported as changed, and is neither a site nor a tensor", name)
        elif name in was and name in now:
            if _look(was[name]) == _look(now[name]) and not _restored(before, after, now[name].tensors()):
                yield Breach(f"{name} is reported as changed, and is as it was", name)
        elif name in before.marks and name in infos and not _restored(before, after, [name]):
            yield Breach(f"{name} is reported as changed, and is as it was", name)


def _restored(before: Snapshot, after: Graph, tensors: Collection[str]) -> bool:
    """Whether one of the tensors has another value or other flags than before."""
    return any(
        name not in before.marks
        or mark(after, name) != before.marks[name]
        or after.info(name) != before.graph.info(name)
        for name in tensors
    )


def _look(site: Site) -> tuple[Any, ...]:
    """An op, what it reads and who reads it, by name."""
    args = {place: node_name(a) if isinstance(a, fx.Node) else repr(a) for place, a in arguments(site.node).items()}
    return site.op, args, sorted(node_name(user) for user in site.node.users)


def _interface(before: Graph, after: Graph) -> Iterator[Breach]:
    """The inputs that must be given are those there were; as many outputs come back."""
    required, now = _required(before), _required(after)
    new = next((name for name in now if name not in before.inputs), None)
    gone = next((name for name in required if name not in after.inputs), None)
    if gone is not None:
        yield Breach(f"the input {gone} is gone; the inputs are {', '.join(after.inputs)}", gone)
    elif new is not None:
        yield Breach(f"the new input {new} has no default", new)
    elif required != now:
        yield Breach(f"the inputs were {', '.join(required)} and are {', '.join(now)}", now[-1])
    outputs = len(before.output_nodes()), len(after.output_nodes())
    if outputs[1] < outputs[0]:
        lost = node_name(before.output_nodes()[-1])
        yield Breach(f"the graph returned {outputs[0]} values and returns {outputs[1]}", lost)


def _required(graph: Graph) -> list[str]:
    """The inputs without a default, in order."""
    return [str(n.target) for n in graph.module.graph.nodes if n.op == "placeholder" and not n.args]


def _constants(old: Site, new: Site, changed: Collection[str]) -> Iterator[Breach]:
    """Another op under the name, an argument lost, or, outside the changed sites, a plain value that differs."""
    if old.op != new.op:
        if new.name not in changed:
            yield Breach(f"{new.name} was {old.op} and is {new.op}", new.name)
        return
    was, now = arguments(old.node), arguments(new.node)
    for place in sorted(was.keys() | now.keys()):
        one, other = was.get(place), now.get(place)
        what = title(new.node, place)
        if isinstance(one, fx.Node) and other is None:
            if new.name in changed and is_constant(new.node):
                continue  # a weight in another form; what it stands for is compared by itself
            yield Breach(f"{new.name} lost its {what}", new.name)
        elif new.name in changed or (isinstance(one, fx.Node) and isinstance(other, fx.Node)):
            continue
        elif isinstance(one, fx.Node) or isinstance(other, fx.Node) or repr(one) != repr(other):
            yield Breach(f"the {what} of {new.name} was {_show(one)} and is {_show(other)}", new.name)


class _Judge:
    """Says of one wire after the other whether the pass may have laid it so."""

    def __init__(self, before: Graph, after: Graph, changed: Collection[str], lossy: bool):
        self.changed, self.lossy = changed, lossy
        self.old = {node_name(n): n for n in before.module.graph.nodes} | dict.fromkeys(before.tensors())
        self.present = {node_name(n) for n in after.module.graph.nodes}

    def breaches(self, wire: Wire) -> Iterator[Breach]:
        old, new = node_name(wire.old), node_name(wire.new)
        if old == new:
            return
        mine = wire.reader in self.changed or belongs(old, self.changed)
        instead = f"{wire.reader} reads {new} where it read {old}"
        unsaid = f"{instead}, and neither is among the changed sites"
        site = wire.reader if wire.reader != OUTPUT else old
        if old not in self.present and new in self.old:
            if not mine:
                yield Breach(f"{old} is gone: {instead}", old)
        elif old not in self.present:
            if not (mine or belongs(new, self.changed)) and (self.lossy or is_constant(wire.old)):
                yield Breach(unsaid, site)
        elif new in self.old or not self._comes_from(wire.new, old):
            yield Breach(instead, site)
        elif not (mine or belongs(new, self.changed)):
            yield Breach(unsaid, old if wire.old.op == "call_function" else site)

    def _comes_from(self, node: fx.Node, source: str) -> bool:
        """Whether new ops alone lead from ``source`` to ``node``."""
        pending, seen = [node], set()
        while pending:
            here = pending.pop()
            if node_name(here) == source:
                return True
            if here not in seen and node_name(here) not in self.old:
                seen.add(here)
                pending += here.all_input_nodes
        return False


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments by their places, ``1``, ``0.2`` in a list, ``scale``; those that are None are left out."""
    found: dict[str, Any] = {}

    def place(where: str, arg: Any) -> None:
        if isinstance(arg, (list, tuple)):
            for i, one in enumerate(arg):
                place(f"{where}.{i}", one)
        elif arg is not None:
            found[where] = arg

    for key, arg in [*((str(i), a) for i, a in enumerate(node.args)), *node.kwargs.items()]:
        place(key, arg)
    return found


def title(node: fx.Node, place: str) -> str:
    """What an op calls the argument at ``place``: ``bias``, ``eps``."""
    first, dot, rest = place.partition(".")
    if not first.isdigit():
        return place
    if isinstance(node.target, OpOverload):
        names = [argument.name for argument in node.target._schema.arguments]
    else:
        assert callable(node.target)
        try:
            names = list(inspect.signature(node.target).parameters)
        except ValueError:  # an operator of C
            names = []
    at = int(first)
    return (names[at] if at < len(names) else f"argument {at}") + dot + rest


def _show(arg: Any) -> str:
    return node_name(arg) if isinstance(arg, fx.Node) else "left out" if arg is None else str(arg)
