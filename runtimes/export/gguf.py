"""A GGUF file, which llama.cpp and transformers read: packed weights in the encodings that it has.

    model.gguf      packed weights, other matrices in F16, vectors in F32
    config.json, tokenizer.json, …   for those who read the folder

Ternary weights become TQ2_0 (2.06 bits), or TQ1_0 (1.69 bits) where five share a byte; integers of 8 and 4 bits with an
fp16 scale for 32 of a row Q8_0 (8.5 bits) and Q4_0 (4.5 bits), MXFP4 is MXFP4 (4.25 bits). The weights of a graph that
holds none of these are rounded on the way out, one at a time, as llama.cpp rounds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graph import Graph, QcError, raise_all
from graph.dense import Dense
from graph.formats import Ternary
from graph.formats.ggml import Encoding
from graph.formats.trits import unpack_trits
from graph.weights import all_finite
from runtimes.export import ExportReport
from runtimes.export._folder import in_the_way, replacing, sign, sizes_of
from runtimes.export._gguf import Encoded, package, problems, write
from runtimes.export._gguf_blocks import BLOCK, mxfp4, q4_0, q8_0, tq1_0, tq2_0
from runtimes.export.safetensors import describe
from runtimes.serving.gguf import Weight, make_plan

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
    encoding: Encoding | None = None,
) -> ExportReport:
    """Write ``graph`` to the folder ``out``; the file is never sharded.

    Float weights become ``encoding``, q8_0 if nothing is said. Tokenizer and the rest as in the target safetensors.
    Raises all that is in the way before any work.
    """
    plan, errors = make_plan(graph, encoding)
    errors += problems(graph.config)
    if dtype != "fp16":
        errors.append(QcError(f"a GGUF file keeps floats in fp16, not {dtype}", fix="set dtype to fp16"))
    if any(graph.tensor(name).is_meta for name in graph.tensors() if name not in graph.stored):
        errors.append(QcError("the graph has no weights", fix="capture a model folder, not a configuration"))
    raise_all([*errors, *in_the_way(out, source, tokenizer, force)])
    package()
    carried = tokenizer or source
    tensors = [_packed(graph, one) for one in plan.packed] + [_float(one) for one in plan.kept]
    with replacing(out, force) as new:
        write(new / FILE, graph.config, tensors, carried)
        describe(graph, new, "fp16", carried)
        head = {"format": "qc-export", "version": 1, "target": "gguf", "dtype": dtype, "encoding": encoding}
        sign(new, {**head, **(about or {})})
    figures: dict[str, float | int | str] = {"tensors": len(tensors), "packed": len(plan.packed)}
    ternary = sum(isinstance(one.form, Ternary) for one in plan.packed)
    return ExportReport(out, "gguf", dtype, sizes_of(out), figures | {"ternary": ternary})


def check(graph: Graph, encoding: Encoding | None = None) -> list[QcError]:
    """All that stands in the way of an export, from shapes alone."""
    return make_plan(graph, encoding)[1] + problems(graph.config)


def _packed(graph: Graph, one: Weight) -> Encoded:
    blocks = _trits if isinstance(one.form, Ternary) else _integers
    return Encoded(one.name, one.shape, one.encoding, partial(blocks, graph, one))


def _integers(graph: Graph, one: Weight) -> NDArray[np.uint8]:
    sides = one.sides(graph)
    if one.encoding == "MXFP4":
        return mxfp4(sides["indices"].cpu().numpy(), sides["scale"].cpu().numpy())
    encode = {"Q8_0": q8_0, "Q4_0": q4_0}[one.encoding]
    return encode(sides["indices"].cpu().numpy(), _fp16(f"a scale of {one.name}", sides["scale"]).numpy())


def _trits(graph: Graph, one: Weight) -> NDArray[np.uint8]:
    assert isinstance(one.form, Ternary)
    sides = one.sides(graph)
    trits = unpack_trits(sides["indices"].cpu(), one.form.packing, one.form.columns)
    blocks = one.form.columns // BLOCK
    scales = _fp16(f"a scale of {one.name}", sides["scale"]).expand(trits.shape[0], -1)
    wide = scales.repeat_interleave(blocks // scales.shape[1], dim=1)
    return {"TQ2_0": tq2_0, "TQ1_0": tq1_0}[one.encoding](trits.numpy(), wide.numpy())


def _float(one: Dense) -> Encoded:
    """Matrices in fp16; vectors in fp32, as llama.cpp wants them, with the values that fp16 has."""
    if len(one.shape) > 1:
        return Encoded(one.name, one.shape, "F16", lambda: _fp16(one.name, one.load()).numpy())
    return Encoded(one.name, one.shape, "F32", lambda: _fp16(one.name, one.load()).float().numpy())


def _fp16(name: str, value: Tensor) -> Tensor:
    """``value`` in fp16; an error where that has no number for it."""
    found = value.detach().to("cpu", torch.float16)
    if not all_finite(found):
        what = f"{name} is {float(value[~torch.isfinite(found)][0]):g}, which fp16 has no number for"
        raise QcError(what, fix="export to safetensors with dtype bf16, or repair the model")
    return found
