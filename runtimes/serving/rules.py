"""What a server takes: a file each under ``servers/``, held against what an export would write."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from graph import Graph, QcError
from graph.formats import Scaled, fused_weights
from runtimes.serving.plan import Plan, make_plan
from runtimes.serving.settings import TARGETS, Serving

FOLDER = Path(__file__).with_name("servers")


@dataclass(frozen=True, kw_only=True)
class Server:
    """What one server takes."""

    name: str
    title: str
    """As it writes its own name."""

    accepts: tuple[str, ...]
    """What it loads, as ``variant`` names it."""

    packs_head: bool
    """Whether the head may be packed."""

    fuses: bool
    """Whether it multiplies q, k and v as one, and gate and up: then they are packed alike."""

    mixes: bool
    """Whether one checkpoint may hold several of what it loads."""

    kv_cache: tuple[str, ...]
    """The dialects of which it reads the scales of keys and values."""

    multiples: Mapping[str, Mapping[str, int]]
    """By target: what its kernels divide rows and columns of a weight by."""

    groups: Mapping[str, tuple[int, ...]]
    """By target: the weights of a row that may share a scale, where not any number of them may."""


def servers() -> list[str]:
    """The names of all servers."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def load_server(name: str) -> Server:
    """The rules of the server of that name."""
    known = servers()
    if name not in known:
        near = get_close_matches(name, known, n=1)
        fix = f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}"
        raise QcError(f"no server is called {name!r}", fix=fix)
    data: dict[str, Any] = YAML(typ="safe").load((FOLDER / f"{name}.yaml").read_text())
    plain: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    return Server(name=name, **plain)


def variant(settings: Serving) -> str:
    """``fp8-channel``, ``nvfp4-weight-only``, ``modelopt:fp8-static``."""
    scheme = f"-{settings.scheme or 'channel'}" if settings.target == "fp8" else ""
    weights = "-weight-only" if settings.weight_only else ""
    dialect = "" if settings.dialect == "compressed-tensors" else f"{settings.dialect}:"
    shared = "-groups" if settings.target == "int8" and settings.group else weights
    return f"{dialect}{settings.target}{scheme}{shared}"


def refusals(name: str, graph: Graph, settings: Serving) -> Iterator[QcError]:
    """Why the server would not load, or not run, what is written of this graph; from shapes alone."""
    import torch

    server = load_server(name)
    plan, errors = make_plan(graph, settings, torch.float32)
    if errors:
        return  # said of the export itself
    if settings.target == "mixed" and not server.mixes:
        fix = f"pack all weights in one format: {', '.join(_targets(server))}"
        yield QcError(f"{server.title} loads one format a checkpoint, and this is a mixture", fix=fix)
        return
    unknown = [one for one in dict.fromkeys(part.settings for part in plan.parts) if variant(one) not in server.accepts]
    if unknown:
        yield from (_unknown(server, one) for one in unknown)
        return
    if settings.kv_cache is not None and settings.dialect not in server.kv_cache:
        instead = (
            f"set dialect to {server.kv_cache[0]}, or take kv_cache out" if server.kv_cache else "take kv_cache out"
        )
        what = f"{server.title} does not read the scales of keys and values in the dialect {settings.dialect}"
        yield QcError(what, fix=instead)
    yield from _heads(server, plan)
    yield from _sizes(server, plan)
    yield from _groups(server, plan)
    if server.fuses:
        yield from _torn(server, plan)


def _unknown(server: Server, settings: Serving) -> QcError:
    """What it does not load, and what of the same target it does."""
    near = [one for one in server.accepts if one.rpartition(":")[2].startswith(settings.target)]
    instead = f"export one of {', '.join(near)}" if near else f"export one of {', '.join(_targets(server))}"
    return QcError(f"{server.title} does not load {variant(settings)}", fix=instead)


def _targets(server: Server) -> list[str]:
    return [target for target in TARGETS if any(one.startswith(target) for one in server.accepts)]


def _heads(server: Server, plan: Plan) -> Iterator[QcError]:
    for part in plan.parts if not server.packs_head else ():
        if part.linear.role == "head":
            what = f"{server.title} reads the head as floats, and {part.name} is packed"
            yield QcError(what, site=part.linear.name, fix="exclude head from the select of quantize-base")


def _sizes(server: Server, plan: Plan) -> Iterator[QcError]:
    """Kernels work in tiles."""
    for part in plan.parts:
        wanted = server.multiples.get(part.settings.target, {})
        for key, size in zip(("rows", "columns"), plan.shape(part), strict=True):
            if size % wanted.get(key, 1):
                what = f"{server.title} divides the {key} of {part.settings.target} weights by {wanted[key]}"
                what += f", and {part.name} has {size}"
                yield QcError(what, site=part.linear.name, fix="exclude it from the select of quantize-base")


def _groups(server: Server, plan: Plan) -> Iterator[QcError]:
    """Kernels know groups of some sizes."""
    for part in plan.parts:
        known = server.groups.get(part.settings.target, ())
        size = part.form.columns if isinstance(part.form, Scaled) else 0
        if known and size and size not in known:
            sizes = f"{', '.join(map(str, known[:-1]))} or {known[-1]}"
            what = f"{server.title} reads {part.settings.target} in groups of {sizes}"
            what += f", and {part.name} has groups of {size}"
            yield QcError(what, site=part.linear.name, fix=f"set block to {known[-1]} in quantize-base")


def _torn(server: Server, plan: Plan) -> Iterator[QcError]:
    """Of weights that are multiplied as one, some are packed and some are not."""
    packed = {part.linear.name: part for part in plan.parts}
    sites = {site.name: site for site in plan.graph.sites("aten.linear")}
    for group in fused_weights(sites):
        missing = [name for name in group if name not in packed]
        if missing and len(missing) < len(group):
            first = next(name for name in group if name in packed)
            what = f"{server.title} multiplies {', '.join(group)} as one, and {', '.join(missing)} is not packed"
            yield QcError(what, site=first, fix="pack all of them, or none")
