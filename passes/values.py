"""What a graph computes, before and after a pass: every stored constant that an op reads, and the outputs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from graph import Graph, Site
from graph.apart import Parcel, divided
from graph.formats.fidelity import ROUNDING
from graph.formats.format import chunks
from graph.formats.stored import DEQUANTIZE, held
from graph.moments import COVARIANCE
from graph.ops import op_name
from graph.probe import evaluate_constant, failing_site, probe_inputs, psnr_db, run, snr_db, values_by_site
from graph.sites import is_constant, node_name
from graph.weights import all_finite
from passes.base import Close, Contract, Exact, Lossy, TrainingOnly
from passes.marks import Breach, Snapshot, home, mark
from passes.wiring import arguments, title, wires

WEIGHTED = ("aten.linear", "aten.embedding")

SMALL_SNR_DB = 40.0
"""What a lossy pass must keep of a constant that is no weight: a bias, a norm."""

NOTHING = 2.0**-24
"""The smallest step of fp16: a constant that moved by less has no ratio worth a name."""


def finite(before: Snapshot, after: Graph, changed: tuple[str, ...]) -> Iterator[Breach]:
    """Every new value is a number."""
    for name in after.tensors():
        if name in before.marks and mark(after, name) == before.marks[name]:
            continue
        value = after.tensor(name)
        if not all_finite(value):
            yield Breach(f"{name} holds NaN or infinity", home(after, name, changed))


# -- stored ---------------------------------------------------------------------------------------------------------


def stored(contract: Contract, before: Graph, after: Graph) -> Iterator[Breach]:
    """The effective weight, bias or other constant of every op, as the contract allows them to move."""
    was = {site.name: arguments(site.node) for site in before.sites()}
    moved = []
    for site in after.sites():
        if is_constant(site.node):
            continue
        old_args = was.get(site.name, {})
        for place, new in arguments(site.node).items():
            old = old_args.get(place)
            if not (isinstance(old, fx.Node) and isinstance(new, fx.Node) and is_constant(old) and is_constant(new)):
                continue
            if not _same(before, old, after, new):
                moved.append((site, place, old, new))

    def compared(one: tuple[Site, str, fx.Node, fx.Node]) -> Parcel:
        site, place, old, new = one
        values = evaluate_constant(before, old), evaluate_constant(after, new)
        found = list(_apart(contract, site, title(site.node, place), *values))
        fed_back = f"{old.target}{COVARIANCE}" in before.tensors()  # then the nearest are not the best
        found += [] if fed_back else _unfaithful(site, old, new, *values)
        return Parcel(said=[(breach.what, breach.site) for breach in found])

    on_host = after.device.type == "cpu"
    items = ((one, one[2].meta["val"].numel()) for one in moved)
    for _, parcel in divided("compare", compared, items, None if on_host else 1):
        yield from (Breach(what, site) for what, site in parcel.said)


def _same(before: Graph, old: Any, after: Graph, new: Any) -> bool:
    """Whether two constants are the same ops over the same tensors: then nothing needs computing."""
    if not (isinstance(old, fx.Node) and isinstance(new, fx.Node)):
        return repr(old) == repr(new)
    if old.op != new.op or len(old.args) != len(new.args) or old.kwargs.keys() != new.kwargs.keys():
        return False
    if old.op == "get_attr":
        name = str(old.target)
        return name == new.target and mark(before, name) == mark(after, name)
    pairs = [*zip(old.args, new.args, strict=True), *((old.kwargs[k], new.kwargs[k]) for k in old.kwargs)]
    return old.target == new.target and all(_same(before, a, after, b) for a, b in pairs)


def _apart(contract: Contract, site: Site, name: str, old: Tensor, new: Tensor) -> Iterator[Breach]:
    if old.shape != new.shape:
        yield Breach(f"the {name} of {site.name} was {list(old.shape)} and is {list(new.shape)}", site.name)
    elif isinstance(contract, Lossy):
        floor = contract.min_weight_snr_db if site.op in WEIGHTED and name == "weight" else SMALL_SNR_DB
        found = snr_db(old, new)
        if not found >= floor and not _distance(old, new) <= NOTHING:
            yield Breach(f"the {name} of {site.name} kept {found:.1f} dB of {floor:g} dB SNR", site.name)
    elif isinstance(contract, (Exact, TrainingOnly)) and not torch.equal(old, new.to(old.dtype)):
        yield Breach(f"the {name} of {site.name} changed by up to {_distance(old, new):.3g}", site.name)


def _unfaithful(site: Site, old: fx.Node, new: fx.Node, was: Tensor, now: Tensor) -> Iterator[Breach]:
    """A weight that this pass packed stands for what it was packed from: each value is the nearest of its block."""
    packed = _packed(site.graph, new)
    if old.op != "get_attr" or packed is None or was.shape != now.shape:
        return
    form, sides = held(site.graph, packed)
    cut, largest = form.by_row(sides), max(abs(float(x)) for x in was.aminmax())
    rounding = max(torch.finfo(dtype).eps for dtype in (packed.value.dtype, new.meta["val"].dtype, torch.float32))
    for part in chunks(was):
        rows, got = was[part].float(), now[part].float()
        error = (got - rows).abs()
        allowed = form.widest_error(rows, cut(part), largest) * ROUNDING + 1e-30
        allowed += rounding * torch.maximum(rows.abs(), got.abs()).view(*allowed.shape, -1).amax(-1)
        worst = (error.view(*allowed.shape, -1).amax(-1) / allowed).max().item()
        if not worst <= 1:
            what = f"the weight of {site.name} is {worst:.3g} times further off than {form.name} allows"
            yield Breach(what, site.name)
            return


def _packed(graph: Graph, node: fx.Node) -> Site | None:
    """The site that unpacks a constant, if nothing but casts lies between."""
    while node.op == "call_function" and op_name(node.target) == "aten.to.dtype":
        node = node.all_input_nodes[0]
    return Site(graph, node) if node.op == "call_function" and op_name(node.target) in DEQUANTIZE else None


# -- computed -------------------------------------------------------------------------------------------------------


def outputs(contract: Contract, before: Graph, after: Graph, batch: int, length: int) -> Iterator[Breach]:
    """The outputs on probe inputs, as the contract allows them to move; the site is the first that moved too far."""
    inputs = probe_inputs(before, batch=batch, length=length)
    olds = run(before, inputs)
    try:
        news = run(after, inputs)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        yield Breach(f"the graph cannot run: {str(error).splitlines()[0]}", failing_site(after, inputs))
        return
    for old, new in zip(olds, news, strict=False):
        what = _disagreement(contract, old, new)
        if what:
            yield Breach(f"the output {what}", _first_diverging(contract, before, after, inputs))


def _disagreement(contract: Contract, old: Tensor, new: Tensor) -> str | None:
    """How two values break the contract, in words; None where they keep it."""
    if old.shape != new.shape or old.dtype != new.dtype:
        return f"was {old.dtype} {list(old.shape)} and is {new.dtype} {list(new.shape)}"
    if not all_finite(new) and all_finite(old):
        return "holds NaN or infinity"
    if isinstance(contract, (Exact, TrainingOnly)) or not old.is_floating_point():
        return None if torch.equal(old, new) else f"moved by up to {_distance(old, new):.3g}"
    if isinstance(contract, Close):
        atol = contract.atol + _rounding(old)
        close = torch.allclose(new.double(), old.double(), atol=atol, rtol=contract.rtol)
        return None if close else f"moved by up to {_distance(old, new):.3g}, beyond atol {atol:g}"
    found = psnr_db(old, new)
    return None if found >= contract.min_psnr_db else f"kept {found:.1f} dB of {contract.min_psnr_db:g} dB PSNR"


def _rounding(value: Tensor) -> float:
    """What the roundings of a network's depth come to in the dtype of ``value``: eight steps of its largest number."""
    return 8 * torch.finfo(value.dtype).eps * value.double().abs().max().item()


def _distance(old: Tensor, new: Tensor) -> float:
    return (old.double() - new.double()).abs().max().item()


def _first_diverging(contract: Contract, before: Graph, after: Graph, inputs: dict[str, Any]) -> str | None:
    """The first site whose value breaks the contract where it is read; the worst one where none does alone.

    A value is compared with what its readers read before: an op that a pass put behind another stands in for it.
    """
    old, new = values_by_site(before, inputs), values_by_site(after, inputs)
    place = {name: i for i, name in enumerate(new)}
    read = {(node_name(w.old), node_name(w.new)) for w in wires(before, after)}
    worst: tuple[float, str | None] = (math.inf, None)
    both = [pair for pair in read if pair[0] in old and pair[1] in new]
    for was, now in sorted(both, key=lambda pair: place[pair[1]]):
        if _disagreement(contract, old[was], new[now]):
            return now
        if old[was].is_floating_point():
            worst = min(worst, (psnr_db(old[was], new[now]), now), key=lambda pair: pair[0])
    return worst[1]
