"""A model for ONNX Runtime; docs/onnx.md says what is in the folder.

Weights go from the graph to the file one at a time, as packed as they are. The folder appears whole or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from graph import Graph, QcError, raise_all
from runtimes.export import ExportReport
from runtimes.export._folder import carry, in_the_way, replacing, sign, sizes_of, write_json
from runtimes.export.safetensors import config_of, generation_config_of
from runtimes.onnx.file import INLINE, onnx, write_model
from runtimes.onnx.plan import plan
from runtimes.onnx.program import OPSET, Program

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def export(
    graph: Graph,
    out: Path,
    *,
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16",
    max_shard: int = 5 * 10**9,
    source: Path | None = None,
    tokenizer: Path | None = None,
    force: bool = False,
    about: Mapping[str, Any] | None = None,
    kv: bool = False,
    inline: int = INLINE,
) -> ExportReport:
    """Write ``graph`` to the folder ``out`` as a model that computes in ``dtype``, weights in files of ``max_shard``.

    With ``kv`` it takes the keys and values of a past and gives all of them back. Tensors of fewer than ``inline``
    bytes lie in ``model.onnx`` itself. Everything missing is named in one go, before any work.
    """
    onnx()
    program = _prepared(graph, dtype, kv, in_the_way(out, source, tokenizer, force))
    carried = tokenizer or source
    with replacing(out, force) as new:
        largest = write_model(program, new, inline=inline, max_file=max_shard)
        if graph.config:
            write_json(new / "config.json", config_of(graph, dtype))
        if carried is not None:
            carry(carried, new)
        if graph.config and graph.kind == "causal-lm" and not (new / "generation_config.json").is_file():
            write_json(new / "generation_config.json", generation_config_of(graph))
        head = {"format": "qc-export", "version": 1, "target": "onnx", "dtype": dtype, "kind": graph.kind, "kv": kv}
        sign(new, {**head, "opset": OPSET, **(about or {})})
    return ExportReport(out, "onnx", dtype, sizes_of(out), _figures(program, largest))


def check(graph: Graph, *, kv: bool = False) -> list[QcError]:
    """All that stands in the way of an export with these options, from shapes alone."""
    wrong = _of_kv(kv)
    return wrong or plan(_in(graph, torch.float32), kv)[1]


def _of_kv(kv: object) -> list[QcError]:
    if isinstance(kv, bool):
        return []
    return [QcError(f"kv is {kv!r}, and the target onnx takes true or false", fix="set kv to true, or take it out")]


def _in(graph: Graph, dtype: torch.dtype) -> Graph:
    """The graph in a dtype, on the CPU."""
    there = graph.dtype is dtype and graph.device.type == "cpu"
    return graph if there else graph.copy().to(dtype, "cpu")


def _prepared(graph: Graph, dtype: str, kv: bool, errors: list[QcError]) -> Program:
    """The model, whose values come when it is written; raises all that is missing or in the way."""
    if dtype not in DTYPES:
        raise QcError(f"ONNX Runtime computes in fp32 or fp16, not {dtype}", fix="set dtype to one of them")
    raise_all(_of_kv(kv))
    if any(graph.tensor(name).is_meta for name in graph.tensors() if name not in graph.stored):
        errors.append(QcError("the graph has no weights", fix="capture a model folder, not a configuration"))
    program, more = plan(_in(graph, DTYPES[dtype]), kv)
    raise_all([*more, *errors])
    return program


def _figures(program: Program, largest: int) -> dict[str, float | int | str]:
    return {
        "opset": OPSET,
        "nodes": len(program.nodes),
        "tensors": len(program.tensors),
        "weight_bytes": program.weight_bytes(),
        "largest_bytes": largest,
    }
