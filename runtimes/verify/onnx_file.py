"""What can be said of an ONNX model's files without running it.

Every weight is there, all come to the bytes of a formula, and the model takes and gives what docs/onnx.md says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from graph import Graph
from graph.formats import Int8, Lut, Scaled, Ternary, VectorLut, format_of, packed_sites
from graph.formats.bits import bits_for
from graph.formats.four_bit import FourBit
from graph.formats.scaled import ELEMENTS
from graph.formats.stored import arguments
from graph.sites import Site
from runtimes.export.safetensors import config_of
from runtimes.onnx.file import MODEL, onnx
from runtimes.onnx.program import BITS, TYPES
from runtimes.verify.findings import Finding

WITHIN = 0.02
"""How far the bytes of all tensors may be from the formula, in its proportion."""

Port = tuple[str, tuple[int | str, ...]]
"""The type of an input or an output, and its sizes; those that move have names."""

_WIDER = {1: 2, 2: 2, 3: 4, 4: 4, 6: 8, 8: 8}
"""Bits of an integer -> those of the narrowest that ONNX has."""


_OF_LIBRARY = frozenset({"transformers_version"})
"""What a configuration says of the library that wrote it, and not of the model."""


def weights_lie(folder: Path) -> Finding:
    """Every tensor beside the model lies in a file that is there and reaches to its end, and no two overlap."""
    what, tensors = "weights", _tensors(folder)
    if isinstance(tensors, str):
        return Finding(what, False, tensors)
    ranges: dict[str, list[tuple[int, int, str]]] = {}
    for tensor in tensors:
        said = {entry.key: entry.value for entry in tensor.external_data}
        if "location" not in said:
            continue
        start, length = int(said.get("offset", 0)), int(said.get("length", -1))
        if length != _bytes(tensor):
            return Finding(what, False, f"{tensor.name} has {length} bytes where its shape needs {_bytes(tensor)}")
        ranges.setdefault(said["location"], []).append((start, start + length, tensor.name))
    for name, found in ranges.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            return Finding(what, False, f"{name} is missing")
        end = 0
        for start, stop, tensor in sorted(found):
            if start < end:
                return Finding(what, False, f"{tensor} begins before the tensor ahead of it ends")
            end = stop
        if end != path.stat().st_size:
            return Finding(what, False, f"{name} has {path.stat().st_size} bytes, its tensors end at {end}")
    count = sum(map(len, ranges.values()))
    return Finding(what, True, f"{len(tensors)} tensors, {count} of them in {len(ranges)} files beside the model")


def ports(folder: Path, graph: Graph, kv: bool, dtype: torch.dtype) -> Finding:
    """Every input and output has its name, its type and its sizes, in their order, and there is no other."""
    what, model = "inputs and outputs", onnx().load(str(folder / MODEL), load_external_data=False)
    for kind, said, wanted in (
        ("input", model.graph.input, _inputs(graph, kv, dtype)),
        ("output", model.graph.output, _outputs(graph, kv, dtype)),
    ):
        found = {port.name: _port(port) for port in said}
        wrong = next((name for name in (*wanted, *found) if not _alike(found.get(name), wanted.get(name))), None)
        if wrong is not None:
            return Finding(
                what, False, f"{kind} {wrong} is {_told(found.get(wrong))} and not {_told(wanted.get(wrong))}"
            )
        if list(found) != list(wanted):
            return Finding(what, False, f"the {kind}s are in another order: {', '.join(found)}")
    return Finding(what, True, f"{len(model.graph.input)} and {len(model.graph.output)}, of any batch and length")


def _inputs(graph: Graph, kv: bool, dtype: torch.dtype) -> dict[str, Port]:
    """What a model takes: tokens and mask, and with ``kv`` the keys and values of a past."""
    found: dict[str, Port] = {}
    for name, value in ((str(n.target), n.meta["val"]) for n in graph.module.graph.nodes if _asked(n)):
        length = "past_and_sequence" if kv and name == "attention_mask" else "sequence"
        found[name] = TYPES[value.dtype], ("batch", length)
    return found | (_past(graph, "past_key_values", "past", dtype) if kv else {})


def _outputs(graph: Graph, kv: bool, dtype: torch.dtype) -> dict[str, Port]:
    """What a model gives: logits or hidden states, and with ``kv`` all keys and values."""
    size = int(graph.output_nodes()[0].meta["val"].shape[-1])
    name = "logits" if graph.kind == "causal-lm" else "last_hidden_state"
    found: dict[str, Port] = {name: (TYPES[dtype], ("batch", "sequence", size))}
    return found | (_past(graph, "present", "past_and_sequence", dtype) if kv else {})


def _past(graph: Graph, stem: str, length: str, dtype: torch.dtype) -> dict[str, Port]:
    found: dict[str, Port] = {}
    for number, site in enumerate(graph.sites("qc.attention")):
        for at, what in ((1, "key"), (2, "value")):
            _, heads, _, size = site.input(at).meta["val"].shape
            found[f"{stem}.{number}.{what}"] = TYPES[dtype], ("batch", int(heads), length, int(size))
    return found


def _asked(node: Any) -> bool:
    """Whether a node is an input that has no default."""
    return bool(node.op == "placeholder" and not node.args)


def _port(port: Any) -> Port:
    held = port.type.tensor_type
    sizes = tuple(size.dim_param or size.dim_value for size in held.shape.dim)
    return str(onnx().TensorProto.DataType.Name(held.elem_type)), sizes


def _alike(found: Port | None, wanted: Port | None) -> bool:
    """Whether sizes and types are the same; models that compute in fp16 may give their results in fp32."""
    if found is None or wanted is None:
        return False
    return found == wanted or (found[0], wanted[0], found[1]) == ("FLOAT", "FLOAT16", wanted[1])


def _told(port: Port | None) -> str:
    return "missing" if port is None else f"{port[0]} [{', '.join(map(str, port[1]))}]"


def configuration(folder: Path, graph: Graph, dtype: Any) -> Finding:
    """``config.json``, which a generator reads too, says of the model what the graph says."""
    if not graph.config:
        return Finding("configuration", True, "none")
    path = folder / "config.json"
    try:
        found = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return Finding("configuration", False, f"{path.name} is missing or damaged")
    wanted = json.loads(json.dumps(config_of(graph, dtype)))
    wrong = [key for key, value in wanted.items() if key not in _OF_LIBRARY and found.get(key) != value]
    if wrong:
        what = f"{path.name} has {wrong[0]} {found.get(wrong[0])!r} where the model has {wanted[wrong[0]]!r}"
        return Finding("configuration", False, what)
    return Finding("configuration", True, str(wanted.get("model_type", "")))


def weights_size(folder: Path, graph: Graph, width: int) -> tuple[Finding, bool, dict[str, float]]:
    """The bytes of all tensors against ``expected_bytes``; whether weights are packed; the difference."""
    tensors = _tensors(folder)
    assert not isinstance(tensors, str), "weights_lie goes first"
    found, wanted = sum(map(_bytes, tensors)), expected_bytes(graph, width)
    off = found / max(1, wanted) - 1
    told = f"{found:,} bytes of tensors, {off:+.2%} of the {wanted:,} expected"
    return Finding("size", abs(off) <= WITHIN, told), bool(packed_sites(graph)), {"size_off": off}


def expected_bytes(graph: Graph, width: int) -> int:
    """What the tensors of a graph come to in ONNX, where floats of the model have ``width`` bytes.

    dense       width a number
    int8        1 a weight, width a row
    int, fp8    bits / 8 a weight, width a scale; ternary as integers of 2 bits
    nf4, fp4    1/2 a weight, 4 a block; the others of four bits likewise
    lut         bits / 8 a weight, or a vector, 4 a level, 4 a number of the scales
    """
    total, packed = 0, set()
    for site in packed_sites(graph):
        total += _packed_bytes(site, width)
        packed |= set(site.tensors())
    read = {str(n.target) for n in graph.module.graph.nodes if n.op == "get_attr"}
    for name in read - packed:
        dtype, size = graph.dtype_of(name), 1
        for length in graph.shape(name):
            size *= length
        total += size * (width if dtype.is_floating_point and not graph.info(name).pinned else dtype.itemsize)
    return total


def _packed_bytes(site: Site, width: int) -> int:
    form, given = format_of(site), arguments(site)
    rows, columns = site.value.shape
    sizes = {key: arg.meta["val"] for key, arg in given.items() if hasattr(arg, "meta")}
    if isinstance(form, Int8):
        return int(rows * columns + rows * width)
    if isinstance(form, FourBit):
        return int(rows * columns // 2 + 4 * sizes["absmax"].numel())
    if isinstance(form, Scaled):
        float_codes, element = form.kind in ("nvfp4", "mxfp4", "fp8", "mxfp8"), ELEMENTS[form.kind].bits
        bits = element if float_codes else _of_integers(element, rows)
        each = 4 if form.kind in ("nvfp4", "mxfp4") else width
        return int(-(-rows * columns * bits // 8) + each * rows * sizes["scale"].shape[1])
    if isinstance(form, Ternary):
        return int(-(-rows * columns * _of_integers(2, rows) // 8) + width * rows * sizes["scale"].shape[1])
    if isinstance(form, VectorLut):
        indices = rows // form.vector * columns * _WIDER[bits_for(form.levels)] // 8
        return int(indices + 4 * (sizes["lut"].numel() + (rows if "scale" in sizes else 0)))
    assert isinstance(form, Lut), f"{site.name} is in an unknown format"
    bits = _WIDER[bits_for(sizes["lut"].shape[-1])]
    scales = sum(sizes[key].numel() for key in ("scale", "scale_a", "scale_b") if key in sizes)
    starts = rows if sizes["lut"].dim() == 2 else 0
    return int(rows * columns * bits // 8 + 4 * (sizes["lut"].numel() + scales + starts))


def _of_integers(bits: int, rows: int) -> int:
    """The bits that integers are held in: of 2 where the outputs are a multiple of 4, else in 4."""
    return max(_WIDER[bits], 2 if rows % 4 == 0 else 4)


def _tensors(folder: Path) -> list[Any] | str:
    """The stored tensors of a model, without the values that lie beside it; or why it cannot be read."""
    library = onnx()
    from google.protobuf.message import DecodeError

    try:
        model = library.load(str(folder / MODEL), load_external_data=False)
    except (OSError, DecodeError):
        return f"{MODEL} is missing or damaged"
    return list(model.graph.initializer)


def _bytes(tensor: Any) -> int:
    """The bytes of a tensor by its type and shape."""
    size = 1
    for length in tensor.dims:
        size *= length
    return -(-size * BITS[onnx().TensorProto.DataType.Name(tensor.data_type)] // 8)
