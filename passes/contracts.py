"""Holding a pass to its contract: what it may not have touched, what its sites may read, what the graph may return.

Each check yields breaches, the most telling first: a breach names a site wherever one can be named.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, fx

from graph import Graph, Site
from graph.formats import arguments, format_of, packed_sites
from graph.ops import op_name
from graph.shapes import dims_of
from graph.sites import node_name
from passes.base import Lossy, Pass, Report
from passes.gradients import dry_run, finite_gradients
from passes.marks import Breach as Breach
from passes.marks import Snapshot as Snapshot
from passes.marks import belongs, home, mark, parts
from passes.values import finite, outputs, stored
from passes.wiring import idle, rewired

FLAGS = ("kind", "aliases", "pinned", "saved", "transposed")
"""What only the pass that changes a tensor may change of what is known of it."""


def breaches(
    step: Pass, before: Snapshot, after: Graph, report: Report, batch: int = 2, length: int = 16
) -> Iterator[Breach]:
    """Everything in which ``after`` is not what ``step`` promised of it."""
    lossy, changed = isinstance(step.contract, Lossy), parts(report.changed)
    for name in before.overwritten():
        what = f"{name} was written to where it lies; give it a new value with set_tensor"
        yield Breach(what, home(before.graph, name))
    yield from rewired(before, after, changed, lossy)
    yield from _types(before.graph, after, changed)
    yield from _tensors(before, after, changed)
    yield from _ties(before.graph, after)
    yield from _packed(after)
    yield from _training_only(after)
    yield from _coverage(step, before.graph, report)
    yield from idle(before, after, report.changed)
    yield from dry_run(before.graph, after)
    if any(after.tensor(name).is_meta for name in after.tensors() if name not in after.stored):
        return  # a plan has no numbers
    yield from finite(before, after, report.changed)
    yield from stored(step.contract, before.graph, after)
    if not step.new_outputs:
        yield from outputs(step.contract, before.graph, after, batch, length)
    yield from finite_gradients(after)


def _types(before: Graph, after: Graph, changed: Collection[str]) -> Iterator[Breach]:
    was = {site.name: site for site in before.sites()}
    for site in after.sites():
        old = was.get(site.name)
        if old is None or not isinstance(site.value, Tensor) or not isinstance(old.value, Tensor):
            continue
        if site.op == old.op == "qc.monotone_levels" and belongs(site.name, changed):
            continue  # side tensors of a weight may become others, and these take the place of one
        if old.value.dtype != site.value.dtype:
            yield Breach(f"{site.name} returned {old.value.dtype} and now returns {site.value.dtype}", site.name)
        if _sizes(old) != _sizes(site):
            yield Breach(f"{site.name} had the shape {_sizes(old)} and now has {_sizes(site)}", site.name)


def _sizes(site: Site) -> str:
    return f"[{', '.join(dims_of(site.node))}]"


def _tensors(before: Snapshot, after: Graph, changed: Collection[str]) -> Iterator[Breach]:
    """Tensors that no changed site reads are there, with their values and flags."""
    allowed = _read_by(before.graph, changed) | _read_by(after, changed)
    infos = after.tensors()
    for name, was in before.graph.tensors().items():
        if name in allowed or belongs(name, changed):
            continue
        if name not in infos:
            yield Breach(f"{name} is gone, and no changed site read it", home(before.graph, name))
            continue
        if mark(after, name) != before.marks[name]:
            yield Breach(f"{name} has another value, and no changed site reads it", home(after, name))
        flags = [flag for flag in FLAGS if getattr(was, flag) != getattr(infos[name], flag)]
        if infos[name].trainable and not was.trainable:
            flags.append("trainable")
        for flag in flags:
            what = f"{flag} of {name} was {getattr(was, flag)} and is {getattr(infos[name], flag)}"
            yield Breach(f"{what}, and no changed site reads it", home(after, name))
    known = {site.name for site in before.graph.sites()}
    for site in after.sites():
        new = [name for name in site.tensors() if name not in before.marks and infos[name].trainable]
        if new and site.name in known and site.name not in changed:
            yield Breach(f"{new[0]} trains, and {site.name}, which reads it, is not among the changed sites", site.name)


def _read_by(graph: Graph, changed: Collection[str]) -> set[str]:
    return {tensor for site in graph.sites() if site.name in changed for tensor in site.tensors()}


def _ties(before: Graph, after: Graph) -> Iterator[Breach]:
    """Every reader of one tensor still reads one and the same value."""
    readers: dict[str, list[tuple[str, int]]] = {}
    for site in before.sites():
        for i, arg in enumerate(site.node.args):
            if isinstance(arg, fx.Node) and arg.op == "get_attr":
                readers.setdefault(str(arg.target), []).append((site.name, i))
    now = {site.name: site.node for site in after.sites()}
    for name, ends in readers.items():
        reads = {site: now[site].args[i] for site, i in ends if site in now and i < len(now[site].args)}
        seen = {node_name(arg) if isinstance(arg, fx.Node) else str(arg) for arg in reads.values()}
        if len(seen) > 1:
            what = f"{' and '.join(reads)} read one tensor, {name}, and now read {' and '.join(sorted(seen))}"
            yield Breach(what, list(reads)[-1])


def _packed(after: Graph) -> Iterator[Breach]:
    """Packed tensors are all there is of a weight: of the types that the format has, and integers do not train."""
    for site in packed_sites(after):
        form, holder = format_of(site), site.input(0).meta["val"].dtype
        dtype = holder if holder.is_floating_point else torch.float32
        made = form.pack(torch.empty(site.value.shape, dtype=dtype, device="meta"))
        for suffix, arg in arguments(site).items():
            if not isinstance(arg, fx.Node):
                continue
            tensor, value, wanted = node_name(arg), arg.meta["val"], made[suffix]
            kind = after.info(tensor).kind if arg.op == "get_attr" else "value"
            if kind != "buffer" and suffix not in form.parameters:
                yield Breach(f"{tensor} is part of a packed weight and is a {kind}", site.name)
            if (value.dtype, value.shape) != (wanted.dtype, wanted.shape):
                has = f"{value.dtype} {list(value.shape)}"
                yield Breach(f"{tensor} is {has}, and {form.name} has {wanted.dtype} {list(wanted.shape)}", site.name)


def _training_only(after: Graph) -> Iterator[Breach]:
    """Nothing is dropped in evaluation mode, and an update reads what its linear reads."""
    for site in after.sites("qc.dropout"):
        if site.node.args[2] is True:
            yield Breach(f"{site.name} drops values in evaluation mode too", site.name)
    for site in after.sites("qc.lora"):
        linear, x = site.input(0), site.input(1)
        while op_name(linear.target) in ("qc.lora", "qc.dora"):
            linear = linear.all_input_nodes[0]
        while op_name(x.target) == "qc.dropout" if x.op == "call_function" else False:
            x = x.all_input_nodes[0]
        if linear.args[0] is not x:
            yield Breach(f"{site.name} reads {node_name(x)}, and its linear {node_name(linear)} does not", site.name)


def _coverage(step: Pass, before: Graph, report: Report) -> Iterator[Breach]:
    """Every selected site with something to rewrite was rewritten, and no other was."""
    if not step.ops:
        return
    offered = before.sites(*step.ops)
    selected = [site for site in offered if step.select.accepts(site, before.blocks)]
    shared = {name for site in selected for name in site.tensors()}  # of tied weights, selecting one reader is enough
    stay = {one.weight for one in report.weighed if one.kept}
    for site in selected:
        if site.weight() in stay:
            continue
        if site.name not in report.changed and (site.weight() is not None or not step.idempotent):
            yield Breach(f"{site.name} is selected and was left as it is", site.name)
    for site in offered:
        if site.name in report.changed and site not in selected and shared.isdisjoint(site.tensors()):
            yield Breach(f"{site.name} is not selected and was rewritten", site.name)
