"""Folders that GPU servers load: packed weights in safetensors, and a configuration that says how they are packed.

Weights are packed one at a time on their way out, or written as the graph holds them. The folder appears whole or not
at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from graph import Graph, QcError, raise_all
from graph.dense import Dense, checkpoint_tensors
from graph.inputs import largest_inputs
from graph.weights import Entry, write
from runtimes.ane.ranges import calibration as calibration_rows
from runtimes.export import ExportReport
from runtimes.export._folder import in_the_way, replacing, sign, sizes_of, write_json
from runtimes.export.safetensors import DTYPES, Counted, describe
from runtimes.serving import config, layout
from runtimes.serving.caches import largest_kept
from runtimes.serving.plan import Part, Plan, make_plan, unshared
from runtimes.serving.settings import Dialect, KvCache, Scheme, Serving, Target

SCALES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export(
    graph: Graph,
    out: Path,
    *,
    target: Target,
    dtype: Literal["fp16", "bf16", "fp32"],
    max_shard: int = 5 * 10**9,
    source: Path | None = None,
    tokenizer: Path | None = None,
    force: bool = False,
    about: Mapping[str, Any] | None = None,
    calibration: int = 1024,
    rows: Sequence[Tensor] | None = None,
    **options: Any,
) -> ExportReport:
    """Write ``graph`` to the folder ``out`` as ``target``; ``options`` are those of ``settings_of``.

    What is not packed is written in ``dtype``, and so are float scales that are found yet. Where inputs have a scale
    known beforehand, the graph first runs on ``rows`` of tokens, or on ``calibration`` tokens of text. The rest is as
    in runtimes/export/safetensors.py.
    """
    settings = settings_of(target, **options)
    plan, others = _prepared(graph, settings, dtype, in_the_way(out, source, tokenizer, force))
    settings = plan.settings
    carried = tokenizer or source
    ranges = ranges_of(plan, rows, carried, calibration)
    count = Counted(DTYPES[dtype], dtype)
    entries = [count.entry(tensor) for tensor in others]
    for part in plan.parts:
        entries += _Written(plan, part, ranges.inputs, DTYPES[dtype]).entries()
    entries += _scales_of_caches(settings, ranges, DTYPES[dtype])
    hashes: dict[str, str] = {}
    with replacing(out, force) as new:
        write(new, entries, stem="model", max_shard=max_shard, hashes=hashes)
        describe(graph, new, dtype, carried, {"quantization_config": config.quantization_config(plan, DTYPES[dtype])})
        if settings.dialect == "modelopt":
            write_json(new / "hf_quant_config.json", config.hf_quant_config(plan))
        sign(new, _head(settings, dtype, ranges) | dict(about or {}), hashes)
    return ExportReport(out, target, dtype, sizes_of(out), count.figures() | {"packed": len(plan.parts)})


def check(graph: Graph, *, target: Target, dtype: str, **options: Any) -> list[QcError]:
    """All that stands in the way of an export with these options, from shapes alone."""
    options.pop("calibration", None)
    settings = settings_of(target, **options)
    plan, errors = make_plan(graph, settings, SCALES[dtype])
    return [*errors, *beside(plan, dtype)]


def beside(plan: Plan, dtype: str) -> list[QcError]:
    """What is packed as this is computed with beside bf16 only, in transformers."""
    known = [plan.settings, *(part.settings for part in plan.parts)]
    settings = next((one for one in known if one.bf16_only), None)
    if settings is None or dtype == "bf16":
        return []
    what = settings.target if settings.dialect != "hf" else "the dialect hf"
    return [QcError(f"{what} is computed beside bf16, not {dtype}", fix="set dtype to bf16, or take it out")]


def settings_of(
    target: Target,
    *,
    scheme: Scheme | None = None,
    weight_only: bool = False,
    dialect: Dialect | None = None,
    group: int | None = None,
    kv_cache: KvCache | None = None,
) -> Serving:
    """What is asked for; without a ``dialect`` it is that of compressed-tensors."""
    if dialect == "hf" and scheme is None:
        scheme = "block"
    found = dialect or "compressed-tensors"
    return Serving(target=target, scheme=scheme, weight_only=weight_only, dialect=found, group=group, kv_cache=kv_cache)


@dataclass(frozen=True)
class Ranges:
    """The largest magnitudes that were seen on text."""

    inputs: Mapping[str, float]
    """Of what linears read, by their names in a checkpoint, where that has to be known."""

    kept: Mapping[str, tuple[float, float]]
    """Of keys and values, by the attention that keeps them, where they are rounded."""


def ranges_of(plan: Plan, rows: Sequence[Tensor] | None, carried: Path | None, calibration: int) -> Ranges:
    """What the graph, or text that runs through it, tells of ranges."""
    graph, parts = plan.graph, [part for part in plan.parts if part.settings.calibrated]
    inputs = {part.module: part.seen for part in parts if part.seen is not None}
    unknown = [part for part in parts if part.seen is None]
    kept: dict[str, tuple[float, float]] = {}
    if unknown or plan.settings.kv_cache is not None:
        seen = rows if rows is not None else calibration_rows(graph, carried, calibration)
        if unknown:
            named = largest_inputs(graph, seen, [part.linear.name for part in unknown])
            inputs |= {part.module: named[part.linear.name] for part in unknown}
        if plan.settings.kv_cache is not None:
            kept = largest_kept(graph, seen)
    return Ranges(inputs, kept)


def _scales_of_caches(settings: Serving, ranges: Ranges, dtype: torch.dtype) -> Iterator[Entry]:
    for attention, largest in ranges.kept.items():
        for name, scale in layout.cache_tensors(attention, largest, settings, dtype).items():
            yield Entry(name, tuple(scale.shape), scale.dtype, partial(torch.clone, scale))


def _head(settings: Serving, dtype: str, ranges: Ranges) -> dict[str, Any]:
    """What ``qc verify`` needs to know, to build by itself what the export should compute."""
    asked = {key: value for key, value in vars(settings).items() if key != "target"}
    head = {"format": "qc-export", "version": 1, "target": settings.target, "dtype": dtype}
    return {**head, "serving": asked, "inputs": dict(ranges.inputs), "kept": dict(ranges.kept)}


def _prepared(graph: Graph, settings: Serving, dtype: str, errors: list[QcError]) -> tuple[Plan, list[Dense]]:
    """The plan, and the tensors that are written as they are; raises all that is missing or in the way."""
    if dtype not in DTYPES:
        raise QcError(f"no dtype is called {dtype!r}", fix=f"use one of {', '.join(DTYPES)}")
    config.library(settings)
    tensors, more = checkpoint_tensors(graph)
    if any(graph.tensor(name).is_meta for name in graph.tensors() if name not in graph.stored):
        errors.append(QcError("the graph has no weights", fix="capture a model folder, not a configuration"))
        raise_all([*more, *errors])
    plan, found = make_plan(graph, settings, SCALES[dtype])
    raise_all([*found, *more, *errors, *beside(plan, dtype), *(unshared(plan) if not found else ())])
    taken = {part.name for part in plan.parts}
    return plan, [tensor for tensor in tensors if tensor.name not in taken]


class _Written:
    """The tensors of one weight: their types are known at once, it is packed when the first of them is written."""

    def __init__(self, plan: Plan, part: Part, largest: Mapping[str, float], dtype: torch.dtype):
        self.plan, self.part, self.dtype = plan, part, dtype
        self.inputs = layout.input_tensors(part.settings, largest.get(part.module, 0.0))
        self.made: dict[str, Tensor] = {}
        self.left = 0

    def entries(self) -> Iterator[Entry]:
        """An entry for each of them."""
        planned = self._tensors(self.plan.planned(self.part))
        self.left = len(planned)
        for suffix, value in planned.items():
            take = partial(self._take, suffix)
            yield Entry(f"{self.part.module}.{suffix}", tuple(value.shape), value.dtype, take, self.part.module)

    def _take(self, suffix: str) -> Tensor:
        if not self.made:
            self.made = self._tensors(self.plan.sides(self.part))
        self.left -= 1
        value = self.made[suffix]
        if not self.left:
            self.made = {}
        return value

    def _tensors(self, sides: dict[str, Tensor]) -> dict[str, Tensor]:
        shape, settings = self.plan.shape(self.part), self.part.settings
        return layout.checkpoint_tensors(self.part.form, sides, shape, settings, self.dtype) | self.inputs
