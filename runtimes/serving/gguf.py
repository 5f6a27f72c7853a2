"""Which weights of a graph become which encoding of a GGUF file, and what stands in the way.

    ternary, a scale a row, a weight or a multiple of 256 columns    TQ2_0, or TQ1_0 of five trits a byte
    int8, an fp16 scale for 32 columns                               Q8_0
    int4, an fp16 scale for 32 columns                               Q4_0
    mxfp4                                                            MXFP4

A graph that holds packed weights is written as it is. Of any other graph the linears of the blocks are rounded on the
way out, as llama.cpp rounds them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from graph import Graph, QcError, Site
from graph.dense import Dense, checkpoint_tensors
from graph.formats import Format, Scaled, Ternary, format_of, packed_sites, packed_tensors, store_packed, weight_name
from graph.formats.ggml import GROUP, Encoding, form_of, rounded_groups
from runtimes.serving.held import instead_of
from runtimes.serving.plan import linears_of_blocks

TRITS = 256
"""Values of a row that ternary encodings hold together."""

_KINDS: dict[str, Encoding] = {"int8": "q8_0", "int4": "q4_0"}
"""Of what floats are rounded to."""

_HELD = {"int8": "Q8_0", "int4": "Q4_0", "mxfp4": "MXFP4"}
"""What holds packed weights of each kind."""


@dataclass(frozen=True)
class Weight:
    """A weight, and how it is written."""

    name: str
    form: Format
    site: Site
    """Where it is unpacked, or the linear that reads it as floats."""

    held: bool
    """Whether the graph holds it packed."""

    @property
    def encoding(self) -> str:
        """As GGUF calls it."""
        if isinstance(self.form, Ternary):
            return {"2bit": "TQ2_0", "trit5": "TQ1_0"}[self.form.packing]
        assert isinstance(self.form, Scaled)
        return _HELD[self.form.kind]

    @property
    def module(self) -> str:
        """The name of what reads it in a checkpoint."""
        return self.name.removesuffix(".weight")

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        value = self.site.value if self.held else self.site.input(1).meta["val"]
        return int(value.shape[0]), int(value.shape[1])

    def sides(self, graph: Graph) -> dict[str, Tensor]:
        """Its integers and scales."""
        if self.held:
            return packed_tensors(graph, self.site)
        assert isinstance(self.form, Scaled)
        return rounded_groups(_KINDS[self.form.kind], graph.tensor(self.name).detach())


@dataclass(frozen=True)
class Plan:
    """What a GGUF file of a graph holds."""

    packed: tuple[Weight, ...]
    kept: tuple[Dense, ...]
    """The rest of the checkpoint, in floats."""


def make_plan(graph: Graph, encoding: Encoding | None) -> tuple[Plan, list[QcError]]:
    """The plan, and all that stands in its way, from shapes alone; float weights become q8_0 if nothing is said."""
    tensors, errors = checkpoint_tensors(graph)
    sites = packed_sites(graph)
    if sites:
        packed = [Weight(weight_name(site), format_of(site), site, True) for site in sites]
        errors += [*_latent(packed), *_others(packed, encoding)]
    else:
        form = form_of(encoding or "q8_0")
        packed = [Weight(name, form, site, False) for name, site in linears_of_blocks(graph)]
        if not packed:
            errors.append(QcError("the graph has no linears to write as gguf", fix="export to safetensors"))
    if not errors:
        errors += [error for one in packed if (error := _misfit(graph, one))]
    taken = {one.name for one in packed}
    return Plan(tuple(packed), tuple(one for one in tensors if one.name not in taken)), errors


def packed_copy(graph: Graph, plan: Plan) -> Graph:
    """The graph in fp32 with its weights as the file holds them; that of the plan is left as it is."""
    twin = graph.copy()
    if twin.dtype is not torch.float32:
        twin.to(torch.float32)
    for one in plan.packed:
        if not one.held:
            store_packed(twin, one.name, one.form, one.sides(graph))
    twin.verify()
    return twin


def _latent(packed: list[Weight]) -> Iterator[QcError]:
    for one in packed:
        if getattr(one.form, "latent", False):
            freeze = "freeze-ternary" if isinstance(one.form, Ternary) else "freeze-q"
            what = f"{one.name} is latent: no integers of it are stored"
            yield QcError(what, site=one.site.name, fix=f"run {freeze} before the export")


def _others(packed: list[Weight], encoding: Encoding | None) -> Iterator[QcError]:
    """Formats that no encoding holds, and those that are not the one asked for."""
    kept = [one for one in packed if not _has_encoding(one.form)]
    if kept:
        first = kept[0]
        more = f", and so do {len(kept) - 1} more" if len(kept) > 1 else ""
        what = f"{first.name} holds {first.form.name}{more}, and GGUF has no encoding of it"
        yield QcError(what, site=first.site.name, fix=instead_of(first.form, encoding or "q8_0"))
        return
    wrong = [one for one in packed if encoding is not None and one.encoding != encoding.upper()]
    if wrong:
        first = wrong[0]
        what = f"{first.name} holds {first.form.name}, and is written as it is: not in {encoding}"
        fix = f"take encoding out, or add the pass dequantize before the export, which then rounds to {encoding}"
        yield QcError(what, site=first.site.name, fix=fix)


def _has_encoding(form: Format) -> bool:
    return isinstance(form, Ternary) or (isinstance(form, Scaled) and form.kind in _HELD)


def _misfit(graph: Graph, one: Weight) -> QcError | None:
    """Why a weight does not fit into blocks of one scale."""
    stored = one.name if not one.held else f"{one.name}.indices"
    if graph.info(stored).transposed:
        what = f"{one.name} is stored by columns, which GGUF has no encoding for"
        return QcError(what, site=one.site.name, fix="export to ternary or safetensors")
    columns = one.shape[1]
    if isinstance(one.form, Ternary):
        return _misfit_ternary(one, columns // int(graph.shape(f"{one.name}.scale")[1]))
    assert isinstance(one.form, Scaled)
    if columns % GROUP:
        what = f"{one.name} has {columns} columns, and {one.encoding} packs {GROUP} together"
        fix = "exclude it from quantize-base" if one.held else "pack the others with quantize-base"
        return QcError(what, site=one.site.name, fix=fix)
    if one.form.rows != 1 or (one.form.columns or columns) != GROUP:
        what = f"{one.name} holds {one.form.name}, and {one.encoding} has a scale for every {GROUP} columns of a row"
        return QcError(what, site=one.site.name, fix="set block to 32 in quantize-base")
    if one.form.stored_scale not in (torch.float16, torch.float8_e8m0fnu):
        said = str(one.form.scale_dtype).removeprefix("torch.")
        what = f"the scales of {one.name} are {said}, and those of {one.encoding} float16"
        return QcError(what, site=one.site.name, fix="set scale_dtype to fp16 in quantize-base")
    return None


def _misfit_ternary(one: Weight, share: int) -> QcError | None:
    columns = one.shape[1]
    if columns % TRITS:
        what = f"{one.name} has {columns} columns, and GGUF packs {TRITS} together"
        return QcError(what, site=one.site.name, fix="exclude it from ternary-ste, or export to ternary")
    if share % TRITS:
        what = f"{one.name} has a scale for every {share} columns, and GGUF one for every {TRITS}"
        return QcError(what, site=one.site.name, fix="set granularity to channel, or group to 256, in ternary-ste")
    return None
