"""BitNet's packing, as transformers loads it: ternary weights that multiply tokens of 8 bits.

    model.safetensors    NAME.weight u8 [rows / 4, columns], NAME.weight_scale [1]; other tensors in the dtype asked for
    config.json          with quantization_config: bitnet, offline, and the linears that are not packed

A byte holds the trits of four rows that lie a quarter of all rows apart, the first in its lowest bits. There is one
scale a weight, and tokens are always rounded: ``ternary-ste`` with ``granularity: tensor`` and ``act_bits: 8``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graph import Graph, QcError, Site, raise_all
from graph.dense import Dense
from graph.formats.ternary_file import Packed, split
from graph.formats.trits import unpack_trits
from graph.ops import op_name
from graph.weights import Entry, write
from runtimes.export import ExportReport
from runtimes.export._folder import in_the_way, replacing, sign, sizes_of
from runtimes.export.safetensors import DTYPES, Dtype, describe


def export(
    graph: Graph,
    out: Path,
    *,
    dtype: Dtype = "fp16",
    max_shard: int = 5 * 10**9,
    source: Path | None = None,
    tokenizer: Path | None = None,
    force: bool = False,
    about: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Write ``graph`` to the folder ``out``; arguments as of the target safetensors.

    Raises all that BitNet's packing has no form for, before any work.
    """
    packed, kept, _ = split(graph)
    raise_all([*check(graph), *in_the_way(out, source, tokenizer, force)])
    scales = {one.name.removesuffix(".weight"): one for one in packed}
    hashes: dict[str, str] = {}
    with replacing(out, force) as new:
        entries = [entry for one in packed for entry in _entries(graph, one, DTYPES[dtype])]
        entries += [_kept(graph, one, scales, DTYPES[dtype]) for one in kept]
        write(new, entries, stem="model", max_shard=max_shard, hashes=hashes)
        describe(graph, new, dtype, tokenizer or source, {"quantization_config": _settings(graph, packed)})
        sign(new, {"format": "qc-export", "version": 1, "target": "bitnet", "dtype": dtype, **(about or {})}, hashes)
    return ExportReport(out, "bitnet", dtype, sizes_of(out), {"ternary": len(packed), "tensors": len(entries)})


def check(graph: Graph) -> list[QcError]:
    """All that stands in the way of an export, from shapes alone."""
    packed, _, errors = split(graph)
    return errors + [error for one in packed for error in _misfits(graph, one)]


def _misfits(graph: Graph, one: Packed) -> Iterator[QcError]:
    where = one.site.name
    if one.form.by.group is not None:
        fix = "set granularity to tensor in ternary-ste, or export to ternary"
        yield QcError(f"{one.name} has more than one scale, and BitNet's packing one", site=where, fix=fix)
    if one.transposed:
        what = f"{one.name} is stored by columns, which BitNet's packing has no form for"
        yield QcError(what, site=where, fix="export to ternary or safetensors")
    rows = int(one.site.value.shape[0])
    if rows % 4:
        yield QcError(
            f"{one.name} has {rows} rows, and BitNet packs four together", site=where, fix="export to ternary"
        )
    readers = [site for site in graph.sites("aten.linear", "aten.embedding") if one.site.node in site.node.args]
    if any(not _reads_rounded(reader) for reader in readers):
        fix = "set act_bits to 8 in ternary-ste, or export to ternary"
        yield QcError(f"what {one.name} multiplies is not in 8 bits, as BitNet has it", site=where, fix=fix)


def _reads_rounded(reader: Site) -> bool:
    if reader.op != "aten.linear":
        return False
    x = reader.input(0)
    return x.op == "call_function" and op_name(x.target) == "qc.fake_quantize_tokens"


def _entries(graph: Graph, one: Packed, dtype: torch.dtype) -> Iterator[Entry]:
    rows, columns = one.site.value.shape
    yield Entry(one.name, (rows // 4, columns), torch.uint8, partial(_rows, graph, one))
    yield Entry(f"{one.name}_scale", (1,), dtype, lambda: one.sides(graph)["scale"].reshape(1).to(dtype))


def _rows(graph: Graph, one: Packed) -> Tensor:
    trits = unpack_trits(one.sides(graph)["indices"], one.form.packing, one.form.columns)
    quarters = trits.view(4, -1, one.form.columns)
    return quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6


def _kept(graph: Graph, one: Dense, scales: Mapping[str, Packed], dtype: torch.dtype) -> Entry:
    """A tensor as it is; of a packed linear the bias over the scale, for what is read multiplies both."""
    made = dtype if one.dtype.is_floating_point else one.dtype
    owner = scales.get(one.name.removesuffix(".bias")) if one.name.endswith(".bias") else None
    if owner is None:
        return Entry(one.name, one.shape, made, lambda: one.load().to(made))
    return Entry(
        one.name, one.shape, made, lambda: (one.load() / owner.sides(graph)["scale"].float().view(())).to(made)
    )


def _settings(graph: Graph, packed: list[Packed]) -> dict[str, Any]:
    """What transformers reads: its linears read weights back as they were packed, and multiply with the scale after."""
    known = {one.name for one in packed}
    linears = {weight for site in graph.sites("aten.linear") if (weight := site.weight()) is not None}
    plain = sorted(weight.removesuffix(".weight") for weight in linears - known)
    return {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "offline",
        "use_rms_norm": False,
        "modules_to_not_convert": sorted({"lm_head", *plain}),
    }
