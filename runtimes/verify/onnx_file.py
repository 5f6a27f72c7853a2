"""What can be said of an ONNX model's files without running it: that every weight is there, and what all come to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graph import Graph
from graph.formats import Int8, Lut, Scaled, VectorLut, format_of, packed_sites
from graph.formats.bits import bits_for
from graph.formats.four_bit import FourBit
from graph.formats.scaled import ELEMENTS
from graph.formats.stored import arguments
from graph.sites import Site
from runtimes.onnx.file import MODEL, onnx
from runtimes.onnx.program import BITS
from runtimes.verify.findings import Finding

WITHIN = 0.02
"""How far the bytes of all tensors may be from the formula, in its proportion."""

_WIDER = {1: 2, 2: 2, 3: 4, 4: 4, 6: 8, 8: 8}
"""Bits of an integer -> those of the narrowest that ONNX has."""


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
    int, fp8    bits / 8 a weight, width a scale
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
        bits, count = _WIDER[ELEMENTS[form.kind].bits], sizes["scale"].shape[1]
        each = 4 if form.kind in ("nvfp4", "mxfp4") else width
        return int(rows * columns * bits // 8 + each * rows * count)
    if isinstance(form, VectorLut):
        indices = rows // form.vector * columns * _WIDER[bits_for(form.levels)] // 8
        return int(indices + 4 * (sizes["lut"].numel() + (rows if "scale" in sizes else 0)))
    assert isinstance(form, Lut), f"{site.name} is in an unknown format"
    bits = _WIDER[bits_for(sizes["lut"].shape[-1])]
    scales = sum(sizes[key].numel() for key in ("scale", "scale_a", "scale_b") if key in sizes)
    starts = rows if sizes["lut"].dim() == 2 else 0
    return int(rows * columns * bits // 8 + 4 * (sizes["lut"].numel() + scales + starts))


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
