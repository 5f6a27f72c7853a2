"""Ternary weights in two bits, as compressed-tensors reads them: integers of -2 to 1, of which -2 never occurs.

    weight_packed i32 [rows, columns / 16]    weight_scale [rows, groups] or [1]    weight_shape i64 [2]

Sixteen to a word, the first in its lowest bits, with 2 added: a trit of qc, which has 1 added, and one more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from graph import Graph, QcError, Site
from graph.formats import Ternary, format_of, weight_name
from graph.formats.ternary import two_bits
from graph.ops import op_name

_ONES = 0b01010101
"""1 in each of the four fields of a byte; no field carries, as a trit is 2 at most."""


def tensors(form: Ternary, sides: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bytes with 2 added to each field, and the scales; ``sides`` may have no values."""
    codes, scale = two_bits(sides["indices"], form.columns, form.packing) + _ONES, sides["scale"]
    return {"codes": codes, "scale": scale.reshape(1) if form.by.group is None else scale}


def strategy(form: Ternary) -> dict[str, Any]:
    """What compressed-tensors calls those who share a scale."""
    if form.by.group is None:
        return {"strategy": "tensor"}
    if form.by.group == form.columns:
        return {"strategy": "channel"}
    return {"strategy": "group", "group_size": form.by.group}


def problems(graph: Graph, held: Sequence[Site]) -> Iterator[QcError]:
    """Why the ternary ones of these packed weights are not written in two bits."""
    for site in held:
        form, name = format_of(site), weight_name(site)
        if not isinstance(form, Ternary) or form.latent:
            continue
        if graph.info(f"{name}.indices").transposed:
            what = f"{name} lies the other way round in its checkpoint, which servers do not read packed"
            yield QcError(what, site=site.name, fix="export to ternary or safetensors")
        if any(_rounds_tokens(Site(graph, reader)) for reader in site.node.users):
            what = f"what {name} multiplies is rounded to 8 bits, and servers would leave it as it is"
            yield QcError(what, site=site.name, fix="export to bitnet, or take act_bits out of ternary-ste")


def apart(held: Sequence[Site]) -> Iterator[QcError]:
    """Ternary weights that share their scales in different ways."""
    kinds: dict[str, str] = {}
    for site in held:
        form = format_of(site)
        if isinstance(form, Ternary):
            kinds.setdefault(str(strategy(form)), weight_name(site))
    if len(kinds) > 1:
        first, second = list(kinds.values())[:2]
        what = f"{first} and {second} share their scales in different ways, and a checkpoint has one"
        yield QcError(what, fix="give all the same granularity in ternary-ste, or export to mixed")


def _rounds_tokens(reader: Site) -> bool:
    if reader.op != "aten.linear":
        return False
    x = reader.input(0)
    return x.op == "call_function" and op_name(x.target) == "qc.fake_quantize_tokens"


def none_there() -> QcError:
    """What is said of a graph without ternary weights."""
    return QcError("the graph has no ternary weights", fix="add ternary-ste and freeze-ternary, or export to int4")
