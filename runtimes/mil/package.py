"""Reading an ``.mlpackage``: manifest, model, weights. It shares no code with the exporter, and none with coremltools.

An immediate constant is decoded here; a stored one stays where it is until a function that needs it is prepared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graph.errors import QcError
from runtimes.mil.blob import WeightFile, decode
from runtimes.mil.program import Binding, Function, Immediate, Named, Operation, Stored, Variable, tensor_type
from runtimes.mil.proto import definitions
from runtimes.mil.types import DTYPES, TensorType

_FIX = "the package is damaged: export it again"
_PLACE = "@model_path/"


class Package:
    """A saved ML program."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.model = _model_file(self.folder)
        spec = _parsed(self.model)
        self.metadata: dict[str, str] = dict(spec.description.metadata.userDefined)
        self.default: str = spec.description.defaultFunctionName or "main"
        self._files: dict[Path, WeightFile] = {}
        described = _described(spec.description)
        self.functions: dict[str, Function] = {
            name: self._function(name, function, described.get(name, {}))
            for name, function in sorted(spec.mlProgram.functions.items())
        }
        if not self.functions:
            raise QcError(f"{self.folder} holds no function", fix=_FIX)

    def function(self, name: str | None = None) -> Function:
        """The function of that name; without it, the default one, or the only one."""
        if name is None:
            name = self.default if self.default in self.functions else next(iter(self.functions))
        if name not in self.functions:
            known = ", ".join(self.functions)
            raise QcError(f"{self.folder} has no function called {name!r}", fix=f"its functions are {known}")
        return self.functions[name]

    def weights(self, path: Path) -> WeightFile:
        """A file of constants of this package."""
        if path not in self._files:
            self._files[path] = WeightFile(path)
        return self._files[path]

    def value(self, binding: Immediate | Stored) -> Tensor | str | tuple[str, ...]:
        """A constant, decoded."""
        if isinstance(binding, Immediate):
            return binding.value
        return self.weights(binding.path).read(binding.offset, binding.type)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all its files of constants."""
        return sum(path.stat().st_size for path in self.model.parent.rglob("*.bin"))

    def _function(self, name: str, given: Any, declared: Mapping[str, TensorType]) -> Function:
        where = f"{self.folder.name}/{name}"
        blocks = given.block_specializations
        if given.opset not in blocks:
            raise QcError(f"{where} has no body for its opset {given.opset}", fix=_FIX)
        block = blocks[given.opset]
        inputs: list[Variable] = []
        states: list[Variable] = []
        for entry in given.inputs:
            variable = Variable(entry.name, tensor_type(entry.type, f"{where}: the input {entry.name}"))
            (states if entry.type.WhichOneof("type") == "stateType" else inputs).append(variable)
        operations = tuple(self._operation(operation, where) for operation in block.operations)
        function = Function(name, given.opset, tuple(inputs), tuple(states), operations, tuple(block.outputs), declared)
        _defined(function, where)
        return function

    def _operation(self, given: Any, where: str) -> Operation:
        at = f"{where}: {given.type}"
        outputs = tuple(Variable(o.name, tensor_type(o.type, f"{at} {o.name}")) for o in given.outputs)
        at = f"{at} {outputs[0].name}" if outputs else at
        inputs = {
            key: tuple(
                Named(b.name) if b.WhichOneof("binding") == "name" else self._constant(b.value, f"{at}, its {key}")
                for b in argument.arguments
            )
            for key, argument in given.inputs.items()
        }
        attributes = {key: self._constant(value, f"{at}, its {key}") for key, value in given.attributes.items()}
        return Operation(given.type, inputs, outputs, attributes, len(given.blocks))

    def _constant(self, given: Any, where: str) -> Binding:
        declared = tensor_type(given.type, where)
        if given.WhichOneof("value") == "blobFileValue":
            name = given.blobFileValue.fileName
            if not name.startswith(_PLACE) or ".." in name:
                raise QcError(f"{where} names the file {name}", fix=_FIX)
            if not declared.static:
                raise QcError(f"{where} is stored and has no fixed shape", fix=_FIX)
            return Stored(declared, self.model.parent / name.removeprefix(_PLACE), given.blobFileValue.offset)
        return Immediate(declared, _immediate(given.immediateValue, declared, where))


def _model_file(folder: Path) -> Path:
    manifest = folder / "Manifest.json"
    if not manifest.is_file():
        raise QcError(f"{folder} is no Core ML package: it has no Manifest.json", fix="give a .mlpackage folder")
    try:
        about = json.loads(manifest.read_text())
        entry = about["itemInfoEntries"][about["rootModelIdentifier"]]
        path = folder / "Data" / str(entry["path"])
    except (ValueError, KeyError, TypeError, IndexError):
        raise QcError(f"{manifest} is damaged", fix=_FIX) from None
    if not path.is_file():
        raise QcError(f"{path} is missing", fix=_FIX)
    return path


def _parsed(path: Path) -> Any:
    from google.protobuf.message import DecodeError

    spec = definitions().Model()
    try:
        spec.ParseFromString(path.read_bytes())
    except DecodeError:
        raise QcError(f"{path} is not a Core ML model", fix=_FIX) from None
    if spec.WhichOneof("Type") != "mlProgram":
        kind = spec.WhichOneof("Type") or "nothing"
        raise QcError(f"{path} is {kind}, not an ML program", fix="export for iOS 15 or newer")
    return spec


_FEATURES = {65568: "fp32", 65552: "fp16", 131104: "int32", 65600: "fp32", 131080: "int8"}
"""ArrayFeatureType.ArrayDataType of FeatureTypes.proto; a double arrives as fp32."""


def _described(description: Any) -> dict[str, dict[str, TensorType]]:
    """Function -> name -> type, of what the description promises to an app."""
    functions = list(description.functions)
    entries = [(f.name, f) for f in functions] if functions else [("main", description)]
    found: dict[str, dict[str, TensorType]] = {}
    for name, entry in entries:
        types: dict[str, TensorType] = {}
        for feature in (*entry.input, *entry.output, *entry.state):
            kind = feature.type.WhichOneof("Type")
            array = {"multiArrayType": feature.type.multiArrayType, "stateType": feature.type.stateType.arrayType}
            dtype = _FEATURES.get(array[kind].dataType) if kind in array else None
            if dtype is not None and array[kind].shape and not array[kind].WhichOneof("ShapeFlexibility"):
                types[feature.name] = TensorType(DTYPES[dtype], tuple(array[kind].shape))
        found[name] = types
    return found


def _immediate(given: Any, declared: TensorType, where: str) -> Tensor | str | tuple[str, ...]:
    if given.WhichOneof("value") != "tensor":
        raise QcError(f"{where} is a {given.WhichOneof('value')}, which is not read", fix="use tensors alone")
    tensor = given.tensor
    which = tensor.WhichOneof("value")
    if which == "strings":
        texts = tuple(tensor.strings.values)
        return texts if declared.shape else texts[0] if texts else ""
    if which is None:
        raise QcError(f"{where} has no value", fix=_FIX)
    if which == "bytes":
        packed = np.frombuffer(tensor.bytes.values, np.uint8)
        needed = (declared.count * declared.dtype.bits + 7) // 8
        if len(packed) != needed:
            raise QcError(f"{where} has {len(packed)} bytes, {declared} needs {needed}", fix=_FIX)
        return decode(packed, declared)
    values = list(getattr(tensor, which).values)
    if len(values) != declared.count:
        raise QcError(f"{where} has {len(values)} values, {declared} needs {declared.count}", fix=_FIX)
    return torch.tensor(values, dtype=declared.dtype.held).reshape([n for n in declared.shape if n is not None])


def _defined(function: Function, where: str) -> None:
    """Every name is made before it is used, and once."""
    known = {v.name for v in (*function.inputs, *function.states)}
    for operation in function.operations:
        for binding in _bindings(operation):
            if isinstance(binding, Named) and binding.name not in known:
                what = f"{where}: {operation.type} {operation.name} reads {binding.name}, which nothing before it makes"
                raise QcError(what, fix=_FIX)
        made = [v.name for v in operation.outputs]
        twice = next((name for name in made if name in known), None)
        if twice is not None:
            raise QcError(f"{where}: {twice} is made twice", fix=_FIX)
        known.update(made)
    for name in function.outputs:
        if name not in known:
            raise QcError(f"{where}: nothing makes the output {name}", fix=_FIX)


def _bindings(operation: Operation) -> Iterator[Binding]:
    for bindings in operation.inputs.values():
        yield from bindings
