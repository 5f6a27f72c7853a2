"""Core ML packages, written with coremltools' MIL builder. This is the only module that knows coremltools.

No graph pass of coremltools runs: what a lowering emits is what the package holds. Two of the default ones are known to
change a program's meaning or format (docs/ane.md); the others have nothing to do on programs written like this.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from graph.errors import QcError
from runtimes.ane.emitter import Array, Emitter, Var

INSTALL = 'pip install "qc-compiler[ane]"'


@dataclass(frozen=True)
class Port:
    """An input of a function, or a state."""

    shape: tuple[int, ...]
    dtype: str = "fp16"
    """fp16 or int32."""

    state: bool = False


@dataclass(frozen=True)
class FunctionPlan:
    """A function to be written: its inputs, and what writes its ops."""

    inputs: Mapping[str, Port]
    body: Callable[[Emitter], None]


@cache
def coremltools() -> Any:
    """The library, without the words it has for machines that are no Mac; a QcError where it is missing."""
    with _silent():
        try:
            import coremltools as library
        except ModuleNotFoundError as error:
            if error.name != "coremltools":
                raise
            raise QcError("writing Core ML packages needs coremltools, which is not installed", fix=INSTALL) from None
    return library


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """It warns of what only a Mac has and of versions it has not been tested with, and draws progress bars."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def write_package(functions: Mapping[str, FunctionPlan], path: Path, target: str) -> None:
    """Write a package of these functions, the first the default one; what they share is stored once.

    ``target`` is coremltools' name of the oldest system that loads it: iOS18.
    """
    library = coremltools()
    from coremltools.converters.mil.mil import Program

    opset = getattr(library.target, target)
    with _silent():
        program = Program()
        for name, plan in functions.items():
            program.add_function(name, _build(plan, opset))
        program.default_function_name = next(iter(functions))
        program.export_as_multifunction = True
        _share(program)
        model = library.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=opset,
            skip_model_load=True,
            pass_pipeline=library.PassPipeline.EMPTY,
        )
        model.save(str(path))


def _build(plan: FunctionPlan, opset: Any) -> Any:
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import Function, types

    dtypes = {"fp16": types.fp16, "int32": types.int32}
    specs = {
        name: (mb.StateTensorSpec if port.state else mb.TensorSpec)(port.shape, dtypes[port.dtype])
        for name, port in plan.inputs.items()
    }
    with Function(specs, opset_version=opset) as function:
        plan.body(MilEmitter(function, plan.inputs))
    return function


def _share(program: Any) -> None:
    """Give equal constants one identity, in which coremltools stores them once, across functions too."""
    known: dict[tuple[int, str], str] = {}
    for function in program.functions.values():
        for op in function.operations:
            if op.op_type != "const" or not isinstance(op.outputs[0].val, np.ndarray):
                continue
            value: Array = op.outputs[0].val
            dtype = str(op.outputs[0].dtype)
            key = (id(value), dtype)
            if key not in known:
                digest = hashlib.sha256(np.ascontiguousarray(value).data).hexdigest()
                known[key] = f"{digest} {dtype} {value.shape}"
            op.weight_id = known[key]


class MilEmitter:
    """A function of a MIL program."""

    def __init__(self, function: Any, ports: Mapping[str, Port]):
        from coremltools.converters.mil import Builder

        self.function, self.ports, self.builder = function, ports, Builder
        self.prefix, self.names = "", Counter[str]()

    def at(self, site: str) -> None:
        self.prefix = re.sub(r"\W+", "_", site)

    def input(self, name: str) -> Var:
        found: Var = self.function.inputs[name]
        if not self.ports[name].state:
            return found
        before, self.prefix = self.prefix, name
        var = self.op("read_state", input=found)
        self.prefix = before
        return var

    def constant(self, value: Array) -> Var:
        return self.op("const", val=value)

    def lut_weight(self, indices: Array, levels: Array, bits: int) -> Var:
        groups, found = levels.shape
        table = np.concatenate([levels, np.repeat(levels[:, -1:], (1 << bits) - found, axis=1)], axis=1)
        lut = table.reshape(groups, *(1,) * (indices.ndim - 1), 1 << bits, 1)
        return self.op("constexpr_lut_to_dense", indices=self._narrow(indices, bits), lut=lut)

    def vector_weight(self, indices: Array, table: Array, bits: int) -> Var:
        entries, width = table.shape
        full = np.concatenate([table, np.repeat(table[-1:], (1 << bits) - entries, axis=0)])
        lut = full.reshape(*(1,) * indices.ndim, 1 << bits, width)
        return self.op("constexpr_lut_to_dense", indices=self._narrow(indices, bits), lut=lut, vector_axis=0)

    def int8_weight(self, values: Array, scale: Array) -> Var:
        return self.op("constexpr_blockwise_shift_scale", data=values, scale=scale)

    def op(self, kind: str, **inputs: Any) -> Var:
        name = f"{self.prefix}_{kind}" if self.prefix else kind
        self.names[name] += 1
        count = self.names[name]
        made: Var = getattr(self.builder, kind)(**inputs, name=name if count == 1 else f"{name}_{count}")
        return made

    def update_state(self, name: str, value: Var) -> Var:
        return self.op("coreml_update_state", state=self.function.inputs[name], value=value)

    def outputs(self, values: Sequence[tuple[str, Var]]) -> None:
        for name, value in values:
            value.set_name(name)  # type: ignore[attr-defined]
        self.function.set_outputs([value for _, value in values])

    def _narrow(self, indices: Array, bits: int) -> Array:
        from coremltools.converters.mil.mil import types

        return indices if bits == 8 else indices.view(getattr(types, f"np_uint{bits}_dtype"))  # the bytes are shared
