"""Two folders in one: the ternary weights packed, and the same as plain floats that transformers loads.

    ternary.json            every weight: shape, packing, scales, share of zeros, sha256; what is kept; sizes on disk
    ternary.safetensors     NAME.indices u8 and NAME.scale of the ternary weights, all other tensors as floats
    dequantized/            an export for transformers: scale times integer, never what was trained behind them

Integers and scales lie in safetensors, for JSON cannot hold them; the JSON has names, shapes, rules and hashes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from graph import Graph, QcError, raise_all
from graph.formats.ternary_file import Packed, account, described, split
from graph.formats.ternary_rule import SMALLEST
from graph.hashes import sha256, tensor_sha256
from graph.weights import Entry, write
from runtimes.export import ExportReport
from runtimes.export._folder import carry, in_the_way, replacing, sign, sizes_of, write_json
from runtimes.export.safetensors import DTYPES, Dtype
from runtimes.export.safetensors import export as export_dense

RECORD, WEIGHTS, FLOATS = "ternary.json", "ternary.safetensors", "dequantized"


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
    """Write the ternary weights of ``graph`` and what they stand for to the folder ``out``.

    ``dtype`` is that of the floats: what is kept, and ``dequantized``. ``about`` goes into ``qc-export.json``; what it
    has of ``reports`` says by which rule the weights became ternary. Raises all that is in the way before any work.
    """
    packed, kept, errors = split(graph)
    raise_all([*errors, *in_the_way(out, source, tokenizer, force)])
    sizes = account(graph, packed, kept, DTYPES[dtype].itemsize)
    carried = tokenizer or source
    with replacing(out, force) as new:
        records = _write(graph, new, packed, [_kept(one, DTYPES[dtype]) for one in kept])
        floats = export_dense(graph, new / FLOATS, dtype=dtype, max_shard=max_shard, tokenizer=carried)
        if carried is not None:
            carry(carried, new)
        file_bytes = (new / WEIGHTS).stat().st_size
        figures = sizes.figures(file_bytes) | {"zero_share": _zeros(records)}
        record = {
            "format": "qc-ternary",
            "version": 1,
            "quantization_scheme": "1.58-bit",
            "rule": _rule((about or {}).get("reports", ())),
            "smallest_scale": SMALLEST,
            "weights": records,
            "kept": {one.name: {"shape": list(one.shape), "dtype": dtype} for one in kept},
            "weighed": _weighed((about or {}).get("reports", ())),
            "figures": figures,
            "arithmetic": sizes.arithmetic(),
            "sha256": {WEIGHTS: sha256(new / WEIGHTS)},
        }
        write_json(new / RECORD, record)
        sign(new, {"format": "qc-export", "version": 1, "target": "ternary", "dtype": dtype, **(about or {})})
    said = {"arithmetic": sizes.arithmetic(), "dequantized_bytes": floats.bytes}
    return ExportReport(out, "ternary", dtype, sizes_of(out), figures | said)


def check(graph: Graph) -> list[QcError]:
    """All that stands in the way of an export, from shapes alone."""
    return split(graph)[2]


def _write(graph: Graph, new: Path, packed: list[Packed], entries: list[Entry]) -> dict[str, Any]:
    """Write all tensors to one file; what the record says of the packed ones."""
    records: dict[str, Any] = {}
    for one in packed:
        sides = one.sides(graph)
        hashes = {key: tensor_sha256(value) for key, value in sides.items()}
        records[one.name] = described(one, sides) | {"sha256": hashes}
        for key, value in sides.items():
            entries.append(Entry(f"{one.name}.{key}", tuple(value.shape), value.dtype, lambda v=value: v))  # type: ignore[misc]
    write(new, entries, stem=Path(WEIGHTS).stem, max_shard=1 << 62)
    return records


def _kept(one: Any, dtype: torch.dtype) -> Entry:
    made = dtype if one.dtype.is_floating_point else one.dtype
    return Entry(one.name, one.shape, made, lambda: one.load().to(made))


def _weighed(reports: Any) -> dict[str, Any]:
    """Of every weight among which some were chosen to stay: what packing it loses, and whether it stayed."""
    found = [one for report in reports for one in report.get("weighed", ()) if report["pass"] == "ternary-ste"]
    return {one["weight"]: {"output_error": one["error"], "kept": one["kept"]} for one in found}


def _zeros(records: Mapping[str, Any]) -> float:
    """The share of zeros in all ternary weights."""
    counted = [(r["shape"][0] * r["shape"][1], r["zero_share"]) for r in records.values()]
    return float(round(sum(n * share for n, share in counted) / sum(n for n, _ in counted), 6))


def _rule(reports: Any) -> dict[str, Any]:
    """The rule by which weights became ternary, from the report of the pass that packed them; empty if unknown."""
    found = [report["figures"] for report in reports if report["pass"] == "freeze-ternary"]
    return {key: found[-1][key] for key in ("rule", "tau", "scale", "shared_by") if key in found[-1]} if found else {}
