"""Which weights of a graph are written how.

A graph that holds packed weights is written as it is: those, in the format that they have. Of any other graph all
linears of its blocks are packed on the way out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, fx

from graph import Graph, QcError, Site
from graph.formats import (
    Format,
    FourBit,
    Int8,
    Scaled,
    Ternary,
    format_of,
    fused_weights,
    packed_sites,
    packed_tensors,
    shared_largest,
    weight_name,
)
from graph.formats.scaled import Kind
from graph.ops import op_name
from runtimes.serving import ternary
from runtimes.serving.settings import BLOCK, Scheme, Serving

_SHARED = {"block": (BLOCK, BLOCK), "tensor": (0, 0), "static": (0, 0)}
"""The rows and columns that share a scale in each scheme of fp8; in the others it is a row."""


@dataclass(frozen=True)
class Part:
    """One weight, and how it is written."""

    name: str
    linear: Site
    """The linear that reads it."""

    form: Format
    packed: Site | None = None
    """Where it is unpacked, if the graph holds it packed."""

    rounded: Site | None = None
    """Where what the linear reads is rounded already."""

    @property
    def seen(self) -> float | None:
        """The largest magnitude that it reads, where that is known of the rounding."""
        found: float | None = None if self.rounded is None else self.rounded.node.kwargs.get("seen")  # type: ignore[assignment]
        return found

    @property
    def module(self) -> str:
        """The name of the linear in a checkpoint."""
        return self.name.removesuffix(".weight")


@dataclass(frozen=True)
class Plan:
    """What is written of a graph."""

    graph: Graph
    settings: Serving
    parts: tuple[Part, ...]
    largest: Mapping[str, float]
    """NVFP4: the largest magnitude of all weights that share the global scale of a weight that is packed yet."""

    def sides(self, part: Part) -> dict[str, Tensor]:
        """The packed weight."""
        if part.packed is not None:
            return packed_tensors(self.graph, part.packed)
        form = part.form
        if isinstance(form, Scaled):
            form = replace(form, largest=self.largest.get(part.name))
        return form.pack(self.graph.tensor(part.name).detach())

    def planned(self, part: Part) -> dict[str, Tensor]:
        """The same without values."""
        if part.packed is None:
            return part.form.pack(torch.empty(self.graph.shape(part.name), device="meta"))
        names = (name.removeprefix(f"{part.name}.") for name in part.packed.tensors())
        full = {suffix: f"{part.name}.{suffix}" for suffix in names}
        return {
            suffix: self.graph.tensor(name)  # bitsandbytes writes it as text, whose length is to be known
            if suffix == "absmax_offset"
            else torch.empty(self.graph.shape(name), dtype=self.graph.dtype_of(name), device="meta")
            for suffix, name in full.items()
        }

    def shape(self, part: Part) -> tuple[int, int]:
        """The weight's own, [out, in]."""
        rows, columns = part.linear.input(1).meta["val"].shape
        return int(rows), int(columns)


def make_plan(graph: Graph, settings: Serving, scale_dtype: torch.dtype) -> tuple[Plan, list[QcError]]:
    """The plan, and all that stands in its way. ``scale_dtype`` is that of float scales which are found yet."""
    errors = list(settings.mistakes())
    if errors:
        return Plan(graph, settings, (), {}), errors
    held = packed_sites(graph)
    if held:
        settings = _as_held(settings, held)
        errors += _unfit(settings, held)
        errors += ternary.problems(graph, held) if settings.target == "int2" else ()
        parts = [part for site in held for part in _held(graph, site, settings)] if not errors else []
    elif settings.target == "int2":
        return Plan(graph, settings, (), {}), [ternary.none_there()]
    else:
        form = form_of(settings, scale_dtype)
        parts = [Part(name, site, form, rounded=_rounded(site)) for name, site in linears_of_blocks(graph)]
        errors += [error for part in parts if (error := _misfit(graph, part))]
    errors += _rounded_otherwise(settings, parts) if not errors else ()
    if not parts and not errors:
        errors.append(QcError(f"the graph has no linears to write as {settings.target}", fix="export to safetensors"))
    sites = {part.name: part.linear for part in parts if part.packed is None}
    shared = shared_largest(graph, sites) if settings.target == "nvfp4" and not errors else {}
    return Plan(graph, settings, tuple(parts), shared), errors


def form_of(settings: Serving, scale_dtype: torch.dtype = torch.float32) -> Format:
    """The format in which weights are packed that are not yet."""
    if settings.target == "nf4":
        return FourBit("nf4")
    if settings.target == "fp8":
        rows, columns = _SHARED.get(settings.scheme or "", (1, 0))
        return Scaled("fp8", rows, columns, torch.float32 if settings.dialect != "compressed-tensors" else scale_dtype)
    if settings.target == "int4":
        return Scaled("int4", 1, settings.group or BLOCK, scale_dtype)
    return Scaled(cast(Kind, settings.target), scale_dtype=scale_dtype)


def linears_of_blocks(graph: Graph) -> Iterator[tuple[str, Site]]:
    """The weights that linears of blocks read, and nothing else does."""
    readers: dict[str, list[fx.Node]] = {}
    for node in graph.module.graph.nodes:
        if node.op == "get_attr":
            readers.setdefault(str(node.target), []).extend(node.users)
    for site in graph.sites("aten.linear"):
        weight = site.weight()
        outside = site.block is None or site.role in ("embed", "head")
        if weight is not None and not outside and set(readers[weight]) == {site.node}:
            yield weight, site


def _held(graph: Graph, site: Site, settings: Serving) -> Iterator[Part]:
    """A weight that is packed already, with the first linear that reads it."""
    for node in _readers(site.node)[:1]:
        reader = Site(graph, node)
        form = format_of(site) if settings.target in ("nf4", "int2") else form_of(settings)
        yield Part(weight_name(site), reader, form, site, _rounded(reader))


def _rounded(linear: Site) -> Site | None:
    """Where what a linear reads is rounded."""
    node = linear.input(0)
    found = node.op == "call_function" and op_name(node.target) == "qc.fake_quantize_input"
    return Site(linear.graph, node) if found else None


def _rounded_otherwise(settings: Serving, parts: Sequence[Part]) -> Iterator[QcError]:
    """Inputs that the graph rounds to other numbers than a server would."""
    wanted = None if settings.inputs is None else (*settings.inputs, settings.calibrated)
    for part in parts:
        if part.rounded is None:
            continue
        kind, columns = part.rounded.node.args[1], part.rounded.node.args[2]
        if (kind, columns, part.seen is not None) == wanted:
            continue
        reads = "as it is" if settings.inputs is None else f"in {settings.inputs[0]}, scaled in another way"
        if settings.inputs is not None and settings.inputs[0] != kind:
            reads = f"in {settings.inputs[0]}"
        what = f"{part.linear.name} reads what is rounded to {kind}, and the export lets it read its input {reads}"
        fix = f"export to {kind} with the options of quantize-inputs, or take quantize-inputs out"
        yield QcError(what, site=part.rounded.name, fix=fix)
        return


def _readers(node: fx.Node) -> list[fx.Node]:
    """What reads a value, behind a cast or not."""
    found: list[fx.Node] = []
    for user in node.users:
        cast = user.op == "call_function" and op_name(user.target) == "aten.to.dtype"
        found += _readers(user) if cast else [user]
    return found


def unshared(plan: Plan) -> Iterator[QcError]:
    """NVFP4 weights that servers multiply as one, each with a global scale of its own; this one looks at values."""
    held = {part.name: part for part in plan.parts if part.packed is not None}
    if plan.settings.target != "nvfp4":
        return
    for group in fused_weights({name: part.linear for name, part in held.items()}):
        scales = [float(plan.sides(held[name])["global_scale"]) for name in group]
        if len(set(scales)) > 1:
            what = f"{', '.join(group)} have global scales of their own, and servers multiply them as one"
            fix = "pack them in one quantize-base, which gives them one scale"
            yield QcError(what, site=held[group[0]].linear.name, fix=fix)


def _as_held(settings: Serving, held: list[Site]) -> Serving:
    """The scheme of fp8 and the group of int4 are those of the graph, where none is asked for."""
    form, shape = format_of(held[0]), held[0].value.shape
    if not isinstance(form, Scaled):
        return settings
    if settings.target == "fp8" and settings.scheme is None:
        schemes: tuple[Scheme, ...] = ("channel", "tensor", "block")
        found = next((one for one in schemes if fits(replace(settings, scheme=one), form, shape)), None)
        return replace(settings, scheme=found)
    if settings.target == "int4" and settings.group is None:
        return replace(settings, group=form.columns or None)
    return settings


def fits(settings: Serving, form: Format, shape: Sequence[int]) -> bool:
    """Whether a checkpoint of this kind holds weights [out, in] of this format."""
    if settings.target == "nf4":
        return isinstance(form, FourBit) and form.kind == "nf4"
    if settings.target == "int2":
        return isinstance(form, Ternary) and not form.latent
    wanted = form_of(settings)
    if not isinstance(form, Scaled) or not isinstance(wanted, Scaled) or form.kind != wanted.kind:
        return False
    return _sharing(form, shape) == _sharing(wanted, shape)


def _sharing(form: Scaled, shape: Sequence[int]) -> tuple[int, int]:
    """The rows and columns of such a weight that share a scale."""
    return form.rows or shape[0], form.columns or shape[1]


def _unfit(settings: Serving, held: list[Site]) -> Iterator[QcError]:
    """Packed weights of another format: written as this one they would lose twice."""
    for site in held:
        readers = {Site(site.graph, reader).op for reader in _readers(site.node)}
        if readers != {"aten.linear"}:
            what = f"{weight_name(site)} is packed, and {' and '.join(sorted(readers))} reads it: servers read floats"
            yield QcError(what, site=site.name, fix="exclude embed and head from the select of quantize-base")
            return
    latent = [site for site in held if site.op.startswith("qc.fake_quantize")]
    if latent:
        what = f"{weight_name(latent[0])} is a float weight that is packed anew each time it is read"
        freeze = "freeze-ternary" if latent[0].op.endswith("_ternary") else "freeze-q"
        yield QcError(what, site=latent[0].name, fix=f"add the pass {freeze} before the export")
        return
    wrong = [(site, format_of(site)) for site in held if not fits(settings, format_of(site), site.value.shape)]
    if not wrong:
        return
    site, form = wrong[0]
    scheme = f" with scheme {settings.scheme}" if settings.scheme else ""
    more = f", and so do {len(wrong) - 1} more" if len(wrong) > 1 else ""
    what = f"{weight_name(site)} holds {form.name}{more}: as {settings.target}{scheme} it would be rounded twice"
    same = isinstance(form, Scaled) and form.kind == settings.target
    fix = "export without the option that differs" if same else instead_of(form, settings.target)
    yield QcError(what, site=site.name, fix=fix)


def instead_of(form: Format, target: str) -> str:
    """What a graph that holds this format can be written as, where it cannot be as ``target``."""
    own = "nf4" if isinstance(form, FourBit) and form.kind == "nf4" else None
    own = form.kind if isinstance(form, Scaled) else "int2" if isinstance(form, Ternary) else own
    instead = f"export to {own}" if own in ("nf4", "fp8", "nvfp4", "mxfp8", "mxfp4", "int2", "int4", "int8") else ""
    again = f"add the pass dequantize before the export, which then rounds to {target}"
    if target == "int2":
        return instead or "export to int4 after the pass dequantize"
    if instead:
        return f"{instead}, or {again}"
    return f"export to safetensors, or {again}" if not isinstance(form, Int8) else again


def _misfit(graph: Graph, part: Part) -> QcError | None:
    """A weight of a shape, or of a kind of layer, that the format does not know."""
    if graph.info(part.name).transposed:
        what = f"{part.name} lies the other way round in its checkpoint, which servers do not read packed"
        return QcError(what, site=part.linear.name, fix="export to safetensors")
    problem = part.form.problem(part.name, graph.shape(part.name))
    if problem is not None:
        problem.site = part.linear.name
        fix = "pack the others with quantize-base, which leaves out what its select does not name"
        problem.fix = f"{fix}, or take another scheme" if isinstance(part.form, Scaled) and part.form.rows != 1 else fix
    return problem
