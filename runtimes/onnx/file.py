"""An ONNX model on disk: ``model.onnx`` holds the nodes and small tensors, the files beside it hold the weights.

Protobuf cannot hold 2 GB, and what is in ``model.onnx`` is read at once; what is beside it is mapped into memory.
Tensors are written one at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from graph import QcError
from runtimes.onnx.program import IR, OPSET, Held, Port, Program

MODEL = "model.onnx"
DATA = "model.onnx.data"

INLINE = 1024
"""Tensors of fewer bytes lie in ``model.onnx``."""

MOST = 1_800_000_000
"""Bytes of tensors that ``model.onnx`` may hold: protobuf ends at 2^31, and the nodes need some."""

ALIGNMENT = 64


@cache
def onnx() -> Any:
    """The package ``onnx``."""
    try:
        return import_module("onnx")
    except ImportError:
        what = "writing ONNX models needs onnx, which is not installed"
        raise QcError(what, fix='pip install "qc-compiler[onnx]"') from None


def write_model(program: Program, folder: Path, *, inline: int = INLINE, max_file: int) -> int:
    """Write the model and its weights, in files of at most ``max_file`` bytes; return the bytes of the largest tensor.

    Tensors of fewer than ``inline`` bytes lie in ``model.onnx``, if all of these fit there.
    """
    library = onnx()
    if sum(held.bytes for held in program.tensors.values() if held.bytes < inline) > MOST:
        inline = INLINE
    proto = library.GraphProto(name="qc")
    beside = [held for held in program.tensors.values() if held.bytes >= inline]
    places = _write_data(beside, folder, max_file)
    for held in program.tensors.values():
        tensor = proto.initializer.add()
        tensor.name, tensor.data_type = held.name, library.TensorProto.DataType.Value(held.type)
        tensor.dims.extend(held.shape)
        if held.name in places:
            tensor.data_location = library.TensorProto.EXTERNAL
            for key, value in places[held.name].items():
                tensor.external_data.add(key=key, value=str(value))
        else:
            tensor.raw_data = _raw(held)
    for node in program.nodes:
        proto.node.append(library.helper.make_node(node.kind, node.inputs, node.outputs, **_settings(node.attributes)))
    proto.input.extend(map(_port, program.inputs))
    proto.output.extend(map(_port, program.outputs))
    opset = [library.helper.make_opsetid("", OPSET)]
    model = library.helper.make_model(proto, producer_name="qc", opset_imports=opset, ir_version=IR)
    (folder / MODEL).write_bytes(model.SerializeToString())
    return max((held.bytes for held in program.tensors.values()), default=0)


def _settings(attributes: dict[str, Any]) -> dict[str, Any]:
    """Attributes as ONNX has them: types as numbers."""
    types = onnx().TensorProto.DataType
    return {key: types.Value(value) if key == "to" else value for key, value in attributes.items()}


def _port(port: Port) -> Any:
    library = onnx()
    return library.helper.make_tensor_value_info(
        port.name, library.TensorProto.DataType.Value(port.type), list(port.dims)
    )


def _write_data(tensors: list[Held], folder: Path, max_file: int) -> dict[str, dict[str, Any]]:
    """Write tensors one behind the other; where each lies."""
    places: dict[str, dict[str, Any]] = {}
    for number, part in enumerate(_parts(tensors, max_file)):
        name = DATA if number == 0 else f"{DATA}.{number + 1}"
        with open(folder / name, "wb") as file:
            for held in part:
                file.write(b"\0" * (-file.tell() % ALIGNMENT))
                places[held.name] = {"location": name, "offset": file.tell(), "length": held.bytes}
                _write(held, file)
            file.flush()
            os.fsync(file.fileno())
    return places


def _parts(tensors: list[Held], max_file: int) -> Iterator[list[Held]]:
    """The tensors of each file."""
    part: list[Held] = []
    size = 0
    for held in tensors:
        room = -(-held.bytes // ALIGNMENT) * ALIGNMENT
        if part and size + room > max_file:
            yield part
            part, size = [], 0
        part.append(held)
        size += room
    if part:
        yield part


def _write(held: Held, file: BinaryIO) -> None:
    before = file.tell()
    value = held.load()
    file.write(value if isinstance(value, bytes) else memoryview(value.reshape(-1)).cast("B"))
    assert file.tell() - before == held.bytes, f"{held.name} has {file.tell() - before} bytes, not {held.bytes}"


def _raw(held: Held) -> bytes:
    value = held.load()
    data = value if isinstance(value, bytes) else value.tobytes()
    assert len(data) == held.bytes, f"{held.name} has {len(data)} bytes, not {held.bytes}"
    return data
