"""The packages of an export, loaded, and one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from graph.errors import QcError
from runtimes.coreml.meta import Meta, Part
from runtimes.mil import Interpreter, Trace


@dataclass(frozen=True)
class Loaded:
    """A part with its interpreter."""

    part: Part
    package: Interpreter
    inputs: Mapping[str, frozenset[str]]
    """Function -> the inputs that it declares."""


def load_parts(meta: Meta, mode: str) -> list[Loaded]:
    """All parts in the order in which they run; their functions are those that ``meta.json`` names."""
    found = []
    for part in meta.parts:
        package = Interpreter(meta.folder / part.file, mode)
        missing = sorted(set(part.functions) - set(package.package.functions))
        if missing:
            raise QcError(f"{meta.folder / part.file} has no function {missing[0]}", fix="export again")
        inputs = {name: frozenset(v.name for v in package.package.functions[name].inputs) for name in part.functions}
        found.append(Loaded(part, package, inputs))
    return found


def run_part(
    loaded: Loaded,
    function: str,
    given: Mapping[str, Tensor],
    state: object = None,
    traces: Mapping[str, Trace] | None = None,
) -> dict[str, Tensor]:
    """Run a function on those of the values that it declares."""
    wanted = loaded.inputs[function]
    missing = sorted(wanted - set(given))
    if missing:
        what = f"{loaded.part.file} takes {missing[0]}, which no host knows"
        raise QcError(what, fix="export again with this version of qc")
    trace = traces.get(loaded.part.file) if traces is not None else None
    inputs = {name: given[name] for name in wanted}
    return loaded.package.run(inputs, state, function=function, trace=trace)  # type: ignore[arg-type]
