"""Small Core ML packages for tests, made with coremltools' own builder and saved as it saves them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import Function, Program, types

__all__ = ["BOOL", "FP16", "FP32", "INT32", "ct", "function", "inferred", "mb", "one", "save", "spec", "state", "types"]
Body = Callable[..., Any]
FP16, FP32, INT32, BOOL = types.fp16, types.fp32, types.int32, types.bool
_SPECS = {"float16": FP16, "float32": FP32, "int32": INT32, "bool": BOOL}


def spec(value: Any) -> Any:
    """The input type for an array, or for a tuple (shape, type name)."""
    array = value if isinstance(value, np.ndarray) else np.empty(value[0], value[1])
    return mb.TensorSpec(array.shape, _SPECS[array.dtype.name])


def state(*shape: int) -> Any:
    return mb.StateTensorSpec(shape, FP16)


def function(inputs: Mapping[str, Any], body: Body, opset: Any = None) -> Any:
    """``body`` is given the inputs by name, and gives one result or several."""
    with Function(dict(inputs), opset_version=opset or ct.target.iOS18) as made:
        outputs = body(**made.inputs)
        made.set_outputs(list(outputs) if isinstance(outputs, (list, tuple)) else [outputs])
    return made


def save(folder: Path, functions: Mapping[str, Any], pipeline: Any = None, target: Any = None) -> Path:
    """Write functions as a package; without a ``pipeline``, just as they are."""
    program = Program()
    for name, made in functions.items():
        program.add_function(name, made)
    program.default_function_name = next(iter(functions))
    program.export_as_multifunction = len(functions) > 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=target or ct.target.iOS18,
            skip_model_load=True,
            pass_pipeline=pipeline or ct.PassPipeline.EMPTY,
        )
        model.save(str(folder))
    return folder


def one(folder: Path, inputs: Mapping[str, Any], body: Body, **options: Any) -> Path:
    """A package with the one function ``main``."""
    opset = options.get("target")
    return save(folder, {"main": function(inputs, body, opset)}, **options)


def inferred(name: str, arguments: Mapping[str, Any]) -> list[np.ndarray[Any, Any]]:
    """What coremltools itself computes for an op whose arguments are all constant."""
    own = copy.deepcopy(dict(arguments))  # that of thresholded_relu writes into its argument
    with Function({}, opset_version=ct.target.iOS18):
        found = getattr(mb, name)(**own)
    results = found if isinstance(found, (list, tuple)) else [found]
    assert all(r.val is not None for r in results), f"{name} has no value inference"
    return [np.asarray(r.val) for r in results]
