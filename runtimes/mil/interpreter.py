"""Running a saved Core ML package without Core ML.

package = Interpreter(folder, mode="fp16")
state = package.state()
logits = package.run({"hidden": x, "position": p}, state, function="infer")
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from graph.errors import QcError, raise_all
from runtimes.mil.ops.index import slice_overwritten
from runtimes.mil.ops.state import Cell
from runtimes.mil.overwrite import alone, memory_of, release
from runtimes.mil.package import Package
from runtimes.mil.precision import Mode, known_mode, settled
from runtimes.mil.prepare import Decoded, Plan, Step, as_argument, computed, prepare, unknown_operations
from runtimes.mil.program import Named, Variable
from runtimes.mil.trace import Trace

State: TypeAlias = dict[str, Cell]
"""What a model remembers from one call to the next; the functions of a package share it."""


class Interpreter:
    """A package that computes, in one of the modes of ``precision.py``. It reads nothing but the saved files."""

    def __init__(self, package: Package | Path, mode: str = "fp32"):
        self.package = package if isinstance(package, Package) else Package(package)
        self.mode: Mode = known_mode(mode)
        raise_all(unknown_operations(self.package))
        self._plans: dict[str, Plan] = {}
        self._decoded: Decoded = {}

    def plan(self, function: str | None = None) -> Plan:
        """A function made ready, once."""
        wanted = self.package.function(function)
        if wanted.name not in self._plans:
            with torch.inference_mode():
                self._plans[wanted.name] = prepare(self.package, wanted, self.mode, self._decoded)
        return self._plans[wanted.name]

    def state(self, function: str | None = None) -> State:
        """A fresh state: zeros. Functions that name the same states can be given the same one."""
        return {v.name: Cell(_zeros(v, self.package.folder)) for v in self.package.function(function).states}

    def run(
        self,
        inputs: Mapping[str, Tensor],
        state: State | None = None,
        *,
        function: str | None = None,
        trace: Trace | None = None,
    ) -> dict[str, Tensor]:
        """Compute a function. Floats come back as fp32, whatever they are declared as.

        ``state`` is read and written; a function that has states needs one.
        """
        plan = self.plan(function)
        values = self._given(plan, inputs) | self._held(plan, state)
        for variable in plan.function.inputs if trace is not None else ():
            assert trace is not None
            trace.note(variable.name, values[variable.name])
        with torch.inference_mode():
            for step in plan.steps:
                results = self._computed(step, values)
                for variable, value in zip(step.operation.outputs, results, strict=True):
                    values[variable.name] = value
                    if trace is not None:
                        trace.note(variable.name, value)
                for name in step.drops:
                    values.pop(name, None)
        outputs = {name: self._output(plan, values, name) for name in plan.function.outputs}
        release(state or {}, list(outputs.values()))
        return outputs

    def _computed(self, step: Step, values: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """The results of a step; what a state holds is changed where it lies if nobody else looks at it."""
        arguments = _arguments(step, values)
        if step.overwrites is None:
            return computed(step, arguments, self.mode)
        cell: Cell = values[step.overwrites]
        in_place = alone(arguments["x"], cell, values, _name_of_x(step))
        results = computed(step, arguments, self.mode, slice_overwritten if in_place else None)
        cell.own = memory_of(results[0])
        return results

    def _given(self, plan: Plan, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """The inputs, checked, as the mode holds them."""
        where = f"{self.package.folder.name}/{plan.function.name}"
        names = [v.name for v in plan.function.inputs]
        if set(inputs) != set(names):
            what = f"{where} takes {', '.join(names) or 'no input'}; it was given {', '.join(sorted(inputs)) or 'none'}"
            raise QcError(what, fix="give every input by its name, and no other")
        found: dict[str, Any] = {}
        for variable in plan.function.inputs:
            value, wanted = inputs[variable.name], variable.type
            kind = "float" if value.is_floating_point() else "int"
            if not wanted.fits(tuple(value.shape)) or (kind == "float") is not (wanted.dtype.kind == "float"):
                what = f"{where}: the input {variable.name} is {kind}{list(value.shape)}, declared is {wanted}"
                raise QcError(what, fix="give it as it is declared")
            found[variable.name] = settled(value.to(wanted.dtype.held), wanted.dtype, self.mode)
        return found

    def _held(self, plan: Plan, state: State | None) -> dict[str, Any]:
        where = f"{self.package.folder.name}/{plan.function.name}"
        if state is None and not plan.function.states:
            return {}
        for variable in plan.function.states:
            cell = (state or {}).get(variable.name)
            if cell is None or not variable.type.fits(tuple(cell.value.shape)):
                raise QcError(f"{where} needs the state {variable.name}: {variable.type}", fix="give it a state()")
        return {v.name: (state or {})[v.name] for v in plan.function.states}

    def _output(self, plan: Plan, values: Mapping[str, Any], name: str) -> Tensor:
        found = values[name] if name in values else plan.constants[name]
        if not isinstance(found, Tensor):
            raise QcError(f"{self.package.folder.name}: the output {name} is no tensor", fix="export it again")
        return found


def _name_of_x(step: Step) -> str:
    (source,) = step.operation.inputs["x"]
    assert isinstance(source, Named)
    return source.name


def _zeros(variable: Variable, folder: Path) -> Tensor:
    if not variable.type.static:
        raise QcError(f"{folder.name}: the state {variable.name} has no fixed shape", fix="export it again")
    shape = [length for length in variable.type.shape if length is not None]
    return torch.zeros(shape, dtype=variable.type.dtype.held)


def _arguments(step: Step, values: Mapping[str, Any]) -> dict[str, Any]:
    """The constant arguments of a step, and those of this run."""
    arguments = dict(step.constants)
    for parameter, sources in step.live:
        found = [values[source] if isinstance(source, str) else source for source in sources]
        arguments[parameter.name] = as_argument(parameter, found)
    return arguments
