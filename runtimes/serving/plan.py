"""Which weights of a graph are written how.

A graph that holds packed weights is written as it is: those, in the format that they have. Of any other graph all
linears of its blocks are packed on the way out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from graph import Graph, QcError, Site
from graph.formats import (
    Format,
    Scaled,
    Ternary,
    format_of,
    fused_weights,
    packed_sites,
    packed_tensors,
    shared_largest,
    weight_name,
)
from graph.formats.memory import lent
from graph.ops import op_name
from runtimes.serving import ternary
from runtimes.serving.caches import caches_of
from runtimes.serving.held import form_of, readers, settings_held, unfit
from runtimes.serving.settings import Serving


@dataclass(frozen=True)
class Part:
    """One weight, and how it is written."""

    name: str
    linear: Site
    """The linear that reads it."""

    form: Format
    settings: Serving
    """What is asked for of this weight: in a mixture not what is asked for of the others."""

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
    """The largest magnitude of all weights that share the number which scales a weight as a whole, if that is packed
    yet."""

    @property
    def bf16_only(self) -> bool:
        """Whether transformers computes with it beside bf16 and nothing else."""
        return any(part.settings.bf16_only for part in self.parts)

    def sides(self, part: Part) -> dict[str, Tensor]:
        """The packed weight."""
        if part.packed is not None:
            return packed_tensors(self.graph, part.packed)
        form = part.form
        if isinstance(form, Scaled):
            form = replace(form, largest=self.largest.get(part.name))
        return form.pack(self.graph.tensor(part.name, lent).detach())

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
    held = packed_sites(graph)
    parts: list[Part] = []
    if held and not errors:
        parts, errors = _held_parts(graph, settings, held)
    elif settings.target in ("int2", "mixed") and not errors:
        errors = [ternary.none_there() if settings.target == "int2" else _nothing_to_mix()]
    elif not errors:
        form, sites = form_of(settings, scale_dtype), linears_of_blocks(graph)
        parts = [Part(name, site, form, settings, rounded=_rounded(site)) for name, site in sites]
        errors += [error for part in parts if (error := _misfit(graph, part))]
    if not errors:
        errors += [*_rounded_otherwise(parts), *(caches_of(graph)[1] if settings.kv_cache is not None else ())]
    if not parts and not errors:
        errors.append(QcError(f"the graph has no linears to write as {settings.target}", fix="export to safetensors"))
    if settings.target != "mixed" and parts:
        settings = parts[0].settings
    unpacked = {part.name: part.linear for part in parts if part.packed is None}
    whole = any(isinstance(part.form, Scaled) and part.form.whole for part in parts)
    shared = shared_largest(graph, unpacked) if whole and not errors else {}
    return Plan(graph, settings, tuple(parts), shared), errors


def linears_of_blocks(graph: Graph) -> Iterator[tuple[str, Site]]:
    """The weights that linears of blocks read, and nothing else does."""
    readers_: dict[str, list[fx.Node]] = {}
    for node in graph.module.graph.nodes:
        if node.op == "get_attr":
            readers_.setdefault(str(node.target), []).extend(node.users)
    for site in graph.sites("aten.linear"):
        weight = site.weight()
        outside = site.block is None or site.role in ("embed", "head")
        if weight is not None and not outside and set(readers_[weight]) == {site.node}:
            yield weight, site


def _held_parts(graph: Graph, settings: Serving, held: Sequence[Site]) -> tuple[list[Part], list[QcError]]:
    """The packed weights, each with the first linear that reads it, and why they cannot be written."""
    each = settings_held(settings, held)
    errors = list(unfit(settings, held, each))
    if settings.target == "int2" and not errors:
        errors += [*ternary.problems(graph, held), *ternary.apart(held)]
    elif settings.target == "mixed" and not errors:
        errors += ternary.problems(graph, held)
    if errors:
        return [], errors
    parts = []
    for site, one in zip(held, each, strict=True):
        assert one is not None, "see unfit()"
        reader = Site(graph, readers(site.node)[0])
        form = format_of(site) if one.target in ("nf4", "int2") else form_of(one)
        parts.append(Part(weight_name(site), reader, form, one, site, _rounded(reader)))
    return parts, list(_unmixed(graph, parts)) if settings.target == "mixed" else []


def _nothing_to_mix() -> QcError:
    what = "the graph holds no packed weights, and mixed writes them in the formats that they have"
    return QcError(what, fix="add a quantize-base for each format, or export to one of them")


def _unmixed(graph: Graph, parts: Sequence[Part]) -> Iterator[QcError]:
    """What of a mixture no server could run, or transformers would read as other numbers."""
    by_name = {part.name: part for part in parts}
    for group in fused_weights({part.name: part.linear for part in parts}):
        kinds = list(dict.fromkeys(by_name[name].form.name for name in group))
        if len(kinds) > 1:
            what = f"{', '.join(group)} hold {' and '.join(kinds)}, and servers multiply them as one"
            fix = "select all of them in one quantize-base"
            yield QcError(what, site=by_name[group[0]].linear.name, fix=fix)
    beside = next((part for part in parts if part.settings.bf16_only), None)
    for part in parts if beside is not None else ():
        assert beside is not None
        scale = graph.dtype_of(f"{part.name}.scale")
        if scale.is_floating_point and scale is not torch.bfloat16:
            said = str(scale).removeprefix("torch.")
            what = (
                f"the scales of {part.name} are {said}, and beside {beside.settings.target} they are read as bfloat16"
            )
            fix = "set scale_dtype to bf16 in its quantize-base"
            fix = f"export without {beside.settings.target}" if isinstance(part.form, Ternary) else fix
            yield QcError(what, site=part.linear.name, fix=fix)
            return


def _rounded(linear: Site) -> Site | None:
    """Where what a linear reads is rounded."""
    node = linear.input(0)
    found = node.op == "call_function" and op_name(node.target) == "qc.fake_quantize_input"
    return Site(linear.graph, node) if found else None


def _rounded_otherwise(parts: Sequence[Part]) -> Iterator[QcError]:
    """Inputs that the graph rounds to other numbers than a server would."""
    for part in parts:
        if part.rounded is None:
            continue
        settings = part.settings
        wanted = None if settings.inputs is None else (*settings.inputs, settings.calibrated)
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


def unshared(plan: Plan) -> Iterator[QcError]:
    """NVFP4 weights that servers multiply as one, each with a global scale of its own; this one looks at values."""
    held = {part.name: part for part in plan.parts if part.packed is not None and part.settings.target == "nvfp4"}
    for group in fused_weights({name: part.linear for name, part in held.items()}):
        scales = [float(plan.sides(held[name])["global_scale"]) for name in group]
        if len(set(scales)) > 1:
            what = f"{', '.join(group)} have global scales of their own, and servers multiply them as one"
            fix = "pack them in one quantize-base, which gives them one scale"
            yield QcError(what, site=held[group[0]].linear.name, fix=fix)


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
