"""The protobuf definitions of Core ML, without the rest of coremltools.

``import coremltools`` takes seconds and loads the very code whose output is checked here. Its folder ``proto`` needs
none of it, so that alone is loaded, under a name of our own.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from types import ModuleType
from typing import Any

from graph.errors import QcError

_NAME = "runtimes.mil._coremltools_proto"


@cache
def definitions() -> Any:
    """The module ``Model_pb2`` of coremltools."""
    found = importlib.util.find_spec("coremltools")
    if found is None or not found.submodule_search_locations:
        raise QcError("reading a Core ML package needs coremltools", fix="pip install 'coremltools>=9'")
    loaded = sys.modules.get("coremltools.proto")
    if loaded is not None:  # the same messages registered twice would be two types
        return importlib.import_module("coremltools.proto.Model_pb2")
    package = ModuleType(_NAME)
    package.__path__ = [f"{place}/proto" for place in found.submodule_search_locations]
    sys.modules[_NAME] = package
    return importlib.import_module(f"{_NAME}.Model_pb2")
