"""A GGUF file of ternary weights, which llama.cpp and transformers read.

    model.gguf      packed weights as TQ2_0 (2.06 bits) or TQ1_0 (1.69 bits), other matrices in F16, vectors in F32
    config.json, tokenizer.json, …   for those who read the folder

An encoding holds 256 values of a row and one scale together, so scales have to be shared by a row, by a multiple of 256
columns, or by all. Weights that are packed as four trits a byte become TQ2_0, as five TQ1_0.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from graph import Graph, QcError, raise_all
from graph.dense import Dense
from graph.formats.ternary_file import Packed, split
from graph.formats.trits import unpack_trits
from runtimes.export import ExportReport
from runtimes.export._folder import in_the_way, replacing, sign, sizes_of
from runtimes.export._gguf import BLOCK, Encoded, package, problems, tq1_0, tq2_0, write
from runtimes.export.safetensors import describe

FILE = "model.gguf"


def export(
    graph: Graph,
    out: Path,
    *,
    dtype: str = "fp16",
    max_shard: int = 0,
    source: Path | None = None,
    tokenizer: Path | None = None,
    force: bool = False,
    about: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Write the ternary weights of ``graph`` to the folder ``out``; the file is never sharded.

    Tokenizer and the rest as in the target safetensors. Raises all that is in the way before any work.
    """
    packed, kept, _ = split(graph)
    errors = check(graph)
    if dtype != "fp16":
        errors.append(QcError(f"a ternary GGUF file keeps floats in fp16, not {dtype}", fix="set dtype to fp16"))
    raise_all([*errors, *in_the_way(out, source, tokenizer, force)])
    package()
    carried = tokenizer or source
    tensors = [_ternary(graph, one) for one in packed] + [_float(one) for one in kept]
    with replacing(out, force) as new:
        write(new / FILE, graph.config, tensors, carried)
        describe(graph, new, "fp16", carried)
        sign(new, {"format": "qc-export", "version": 1, "target": "gguf", "dtype": dtype, **(about or {})})
    return ExportReport(out, "gguf", dtype, sizes_of(out), {"tensors": len(tensors), "ternary": len(packed)})


def check(graph: Graph) -> list[QcError]:
    """All that stands in the way of an export, from shapes alone."""
    packed, _, errors = split(graph)
    return errors + problems(graph.config) + [error for one in packed if (error := _misfit(graph, one))]


def _misfit(graph: Graph, one: Packed) -> QcError | None:
    """Why a weight does not fit into blocks of one scale."""
    groups = graph.shape(f"{one.name}.scale")[1]
    if one.transposed:
        what = f"{one.name} is stored by columns, which GGUF has no encoding for"
        return QcError(what, site=one.site.name, fix="export to ternary or safetensors")
    if one.form.columns % BLOCK:
        what = f"{one.name} has {one.form.columns} columns, and GGUF packs {BLOCK} together"
        return QcError(what, site=one.site.name, fix="exclude it from ternary-ste, or export to ternary")
    if one.form.columns // groups % BLOCK:
        what = f"{one.name} has a scale for every {one.form.columns // groups} columns, and GGUF one for every {BLOCK}"
        return QcError(what, site=one.site.name, fix="set granularity to channel, or group to 256, in ternary-ste")
    return None


def _ternary(graph: Graph, one: Packed) -> Encoded:
    return Encoded(one.name, {"2bit": "TQ2_0", "trit5": "TQ1_0"}[one.form.packing], partial(_blocks, graph, one))


def _blocks(graph: Graph, one: Packed) -> NDArray[np.uint8]:
    sides = one.sides(graph)
    trits = unpack_trits(sides["indices"], one.form.packing, one.form.columns)
    blocks = one.form.columns // BLOCK
    scales = sides["scale"].to(torch.float16).expand(trits.shape[0], -1)
    wide = scales.repeat_interleave(blocks // scales.shape[1], dim=1)
    encode = {"2bit": tq2_0, "trit5": tq1_0}[one.form.packing]
    return encode(trits.numpy(), wide.numpy())


def _float(one: Dense) -> Encoded:
    """Matrices in fp16; vectors in fp32, as llama.cpp wants them, with the values that fp16 has."""
    if len(one.shape) > 1:
        return Encoded(one.name, "F16", lambda: one.load().to(torch.float16).numpy())
    return Encoded(one.name, "F32", lambda: one.load().to(torch.float16).float().numpy())
