"""Core ML packages for the Apple Neural Engine; docs/ane.md says what is in the folder.

Weights go from the graph to the file one part at a time, as packed as they are. The folder appears whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file

from graph import Graph, QcError, raise_all
from graph.formats import release_freed
from graph.sites import node_name
from runtimes.ane.cache import Mode
from runtimes.ane.mil import coremltools, write_package
from runtimes.ane.packages import functions, host_of, merged, meta_of
from runtimes.ane.parts import Part
from runtimes.ane.plan import Plan, Settings, plan
from runtimes.ane.profile import DEFAULT, load_profile
from runtimes.ane.ranges import beyond, peaks
from runtimes.ane.ranges import calibration as calibration_rows
from runtimes.export import ExportReport
from runtimes.export._folder import carry, in_the_way, replacing, sign, sizes_of
from runtimes.lint.planned import obstacles

META = "meta.json"
ROPE = "rope.safetensors"


def export(
    graph: Graph,
    out: Path,
    *,
    dtype: Literal["fp16"] = "fp16",
    max_shard: int = 5 * 10**9,
    source: Path | None = None,
    tokenizer: Path | None = None,
    force: bool = False,
    about: Mapping[str, Any] | None = None,
    calibration: int = 256,
    **options: Any,
) -> ExportReport:
    """Write ``graph`` to the folder ``out`` as packages; ``options`` are those of ``settings_of``.

    ``max_shard`` is the most bytes of a file, if the chip takes no less. First the graph runs on ``calibration`` tokens
    of text, and what does not fit fp16 numbers there is an error. Everything missing is named in one go, before any
    work.
    """
    coremltools()
    settings = settings_of(**options)
    settings = replace(settings, profile=settings.profile.holding(max_shard))
    found = _prepared(graph, out, settings, dtype, in_the_way(out, source, tokenizer, force))
    largest = _fits(found, tokenizer or source, calibration)
    host = host_of(found)
    found = merged(found, host)
    files = _files(found.parts)
    carried = tokenizer or source
    with replacing(out, force) as new:
        for part, file in zip(found.parts, files, strict=True):
            write_package(functions(found, part, host), new / file, settings.profile.target)
            release_freed()
        tables = {name: host.tables[name].contiguous() for name in sorted(set(found.ropes.values()))}
        if tables:
            save_file(tables, new / ROPE)
        (new / META).write_text(json.dumps(meta_of(found, host, files), indent=2) + "\n")
        if carried is not None:
            carry(carried, new)
        sign(new, {"format": "qc-export", "version": 1, "target": "ane", "dtype": dtype, **(about or {})})
    return ExportReport(out, "ane", dtype, sizes_of(out), _figures(found) | largest)


def check(graph: Graph, **options: Any) -> list[QcError]:
    """All that stands in the way of an export with these options, from shapes alone."""
    found, errors = plan(graph, settings_of(**options))
    return errors if found is None else obstacles(found)


def settings_of(
    *,
    chip: str = DEFAULT,
    context: int = 512,
    prefill: int = 64,
    kv: Mode = "state_slice",
    chunks: int | None = None,
    lengths: tuple[int, ...] = (128,),
    dense_prefill: bool = False,
    memory: int = 64,
) -> Settings:
    """What is asked of an export for ``chip``.

    A decoder has a cache of ``context`` tokens, kept as ``kv`` says, a function for one token and one for ``prefill``
    (0: none), which ``dense_prefill`` gives dense weights in the place of low-rank scales; its blocks are in ``chunks``
    packages, or as few as the chip takes. A memory that it reads has ``memory`` tokens. An encoder has a function for
    each of ``lengths``.
    """
    return Settings(load_profile(chip), context, prefill or None, kv, chunks, lengths, dense_prefill, memory)


def _prepared(graph: Graph, out: Path, settings: Settings, dtype: str, errors: list[QcError]) -> Plan:
    """The plan; raises all that is missing or in the way."""
    if dtype != "fp16":
        errors.append(QcError(f"the Neural Engine computes in fp16, not {dtype}", fix="set dtype to fp16"))
    if any(graph.tensor(name).is_meta for name in graph.tensors() if name not in graph.stored):
        errors.append(QcError("the graph has no weights", fix="capture a model folder, not a configuration"))
    found, more = plan(graph, settings)
    raise_all([*more, *(obstacles(found) if found is not None else ()), *errors])
    assert found is not None
    return found


def _fits(found: Plan, tokenizer: Path | None, tokens: int) -> dict[str, float | int | str]:
    """The value that comes nearest to where fp16 numbers end, on so many tokens; raises all that lie beyond."""
    if not tokens:
        return {}
    sites = {node_name(node) for part in found.parts for node in part.nodes}
    seen = peaks(found.graph, calibration_rows(found.graph, tokenizer, tokens), sites)
    raise_all(list(beyond(seen)))
    return {"largest": seen[0].largest, "largest_of": seen[0].site, "largest_may_be": seen[0].limit}


def _files(parts: list[Part]) -> list[str]:
    names = {"embed": "embeddings", "head": "head", "encoder": "encoder"}
    chunk = [sum(p.role in ("chunk", "encoder") for p in parts[: i + 1]) for i in range(len(parts))]
    return [f"{names.get(p.role, f'chunk_{chunk[i]}')}.mlpackage" for i, p in enumerate(parts)]


def _figures(found: Plan) -> dict[str, float | int | str]:
    return {
        "parts": len(found.parts),
        "weight_bytes": sum(found.weight_bytes(part) for part in found.parts),
        "chip": found.settings.profile.name,
    }
