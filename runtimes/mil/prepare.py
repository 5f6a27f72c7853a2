"""Making a function ready to run: kernels found, element types checked, constants decoded once.

Whatever depends on constants alone is computed here, so that a run is left with the operations on its inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from graph.errors import QcError, raise_all
from runtimes.mil.ops import KERNELS, Kernel, Parameter
from runtimes.mil.overwrite import plan_overwrites
from runtimes.mil.package import Package
from runtimes.mil.precision import Mode, settled
from runtimes.mil.program import Binding, Function, Named, Operation, Stored
from runtimes.mil.quirks import QUIRKS
from runtimes.mil.types import DTYPES, TensorType

Constant: TypeAlias = Tensor | str | tuple[str, ...]
Decoded: TypeAlias = dict[tuple[Any, ...], tuple[Tensor, ...]]
"""Decoded weights that the functions of a package share."""

_FIX = "the package is damaged: export it again"
_MOVES = ("runtimes.mil.ops.shape", "runtimes.mil.ops.index", "runtimes.mil.ops.state")
_STATEFUL = ("read_state", "write_state", "coreml_update_state")


@dataclass
class Step:
    """One operation of a run."""

    operation: Operation
    where: str
    compute: Any
    constants: dict[str, Any] = field(default_factory=dict)
    live: list[tuple[Parameter, list[str | Tensor]]] = field(default_factory=list)
    rounds: bool = True
    """Whether it computes; what only moves elements leaves them as they are."""

    drops: tuple[str, ...] = ()
    """The names that nothing reads afterwards."""

    overwrites: str | None = None
    """The state whose value it replaces, if nothing reads that value by its name afterwards."""


@dataclass
class Plan:
    """A function that is ready to run."""

    function: Function
    steps: list[Step]
    constants: dict[str, Constant]


def unknown_operations(package: Package) -> list[QcError]:
    """The operations of any function that are not in the table, all in one error."""
    found = {
        operation.type
        for function in package.functions.values()
        for operation in function.operations
        if operation.type not in KERNELS and operation.type != "const"
    }
    if not found:
        return []
    what = f"{package.folder.name} has operations that the interpreter does not know: {', '.join(sorted(found))}"
    return [QcError(what, fix="add them in runtimes/mil/ops, or export without them")]


def prepare(package: Package, function: Function, mode: Mode, decoded: Decoded) -> Plan:
    """Bind every operation of a function."""
    raise_all(_interface(package, function))
    types = function.types()
    plan = Plan(function, [], {})
    for operation in function.operations:
        where = f"{package.folder.name}/{function.name}: {operation.type} {operation.name}"
        if operation.type == "const":
            plan.constants[operation.name] = _constant(package, operation, where, mode, decoded)
            continue
        kernel = KERNELS[operation.type]
        step = _bound(package, operation, kernel, plan, where, mode)
        _check_types(operation, kernel, types, where)
        if step.live or operation.type in _STATEFUL:
            plan.steps.append(step)
        else:
            _fold(plan, step, decoded, mode)
    _plan_drops(plan)
    plan_overwrites(plan.steps)
    return plan


def _interface(package: Package, function: Function) -> list[QcError]:
    """Where the model's description and the program disagree about inputs, states and outputs."""
    types = function.types()
    named = [v.name for v in (*function.inputs, *function.states)] + list(function.outputs)
    return [
        QcError(
            f"{package.folder.name}/{function.name}: {name} is {types[name]} in the program and "
            f"{function.declared[name]} in the description",
            fix=_FIX,
        )
        for name in named
        if name in function.declared and function.declared[name] != types[name]
    ]


def _constant(package: Package, operation: Operation, where: str, mode: Mode, decoded: Decoded) -> Constant:
    given = operation.attributes.get("val") or next(iter(operation.inputs.get("val", ())), None)
    if given is None or isinstance(given, Named):
        raise QcError(f"{where} has no value", fix=_FIX)
    declared = operation.outputs[0].type
    if given.type != declared:
        raise QcError(f"{where} holds {given.type} and is declared as {declared}", fix=_FIX)
    return _value(package, given, mode, decoded)


def _value(package: Package, given: Any, mode: Mode, decoded: Decoded) -> Constant:
    if not isinstance(given, Stored):
        value: Constant = package.value(given)
        return settled(value, given.type.dtype, mode) if isinstance(value, Tensor) else value
    key = (given.path, given.offset, given.type)
    if key not in decoded:
        found = package.value(given)
        assert isinstance(found, Tensor)
        decoded[key] = (settled(found, given.type.dtype, mode),)
    return decoded[key][0]


def _bound(package: Package, operation: Operation, kernel: Kernel, plan: Plan, where: str, mode: Mode) -> Step:
    """An operation with its kernel and as much of its arguments as is constant."""
    compute = QUIRKS.get(kernel.name, kernel.function) if mode == "ane" else kernel.function
    step = Step(operation, where, compute, rounds=kernel.function.__module__ not in _MOVES)
    given = operation.arguments
    known = {parameter.name for parameter in kernel.parameters}
    foreign = sorted(set(given) - known)
    missing = [p.name for p in kernel.parameters if p.required and p.name not in given]
    if foreign or missing:
        what = f"has the unknown input {foreign[0]}" if foreign else f"lacks its input {missing[0]}"
        raise QcError(f"{where} {what}", fix=_FIX)
    for parameter in kernel.parameters:
        if parameter.name not in given:
            continue
        sources = [_source(package, binding, plan, mode) for binding in given[parameter.name]]
        if parameter.kind not in ("tensors", "values") and len(sources) != 1:
            raise QcError(f"{where} has {len(sources)} values for {parameter.name}", fix=_FIX)
        if any(isinstance(s, _Live) for s in sources):
            step.live.append((parameter, [s.name if isinstance(s, _Live) else s for s in sources]))  # type: ignore[misc]
        else:
            step.constants[parameter.name] = as_argument(parameter, sources)
    return step


@dataclass(frozen=True)
class _Live:
    name: str


def _source(package: Package, binding: Binding, plan: Plan, mode: Mode) -> _Live | Constant:
    if isinstance(binding, Named):
        return plan.constants[binding.name] if binding.name in plan.constants else _Live(binding.name)
    value = package.value(binding)  # a constexpr's weight: read where it is used, its dense form is kept instead
    return settled(value, binding.type.dtype, mode) if isinstance(value, Tensor) else value


def as_argument(parameter: Parameter, sources: list[Any]) -> Any:
    """What a kernel is given for what an operation names."""
    if parameter.kind == "tensors":
        return sources
    if parameter.kind == "values":
        return tuple(plain(source) for source in sources)
    return sources[0] if parameter.kind == "tensor" else plain(sources[0])


def plain(value: Any) -> Any:
    """A tensor as a number, or a list of them; a text as it is."""
    if isinstance(value, Tensor):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


def _key(operation: Operation) -> tuple[Any, ...] | None:
    """What two functions share of a compressed weight; None where it is not stored in a file."""
    parts: list[Any] = [operation.type]
    for name, (*bindings,) in sorted(operation.arguments.items()):
        for binding in bindings:
            if isinstance(binding, Stored):
                parts.append((name, binding.path, binding.offset, binding.type))
            elif isinstance(binding, Named):
                return None
            else:
                value = binding.value
                parts.append((name, str(binding.type), str(value.tolist()) if isinstance(value, Tensor) else value))
    return tuple(parts) if any(isinstance(p, tuple) and isinstance(p[1], Path) for p in parts) else None


def _fold(plan: Plan, step: Step, decoded: Decoded, mode: Mode) -> None:
    """Compute what depends on constants alone, once."""
    key = _key(step.operation)
    results = decoded.get(key) if key else None
    if results is None:
        results = computed(step, dict(step.constants), mode)
        if key:
            decoded[key] = results
    for variable, value in zip(step.operation.outputs, results, strict=True):
        plan.constants[variable.name] = value


def computed(step: Step, arguments: Mapping[str, Any], mode: Mode, compute: Any = None) -> tuple[Tensor, ...]:
    """The results of a step, rounded as the mode asks and held against their declared types.

    ``compute`` stands in for the step's own function.
    """
    try:
        found = (compute or step.compute)(**arguments)
    except (RuntimeError, ValueError, IndexError, TypeError, KeyError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise QcError(f"{step.where} cannot be computed: {reason}", fix=_FIX) from None
    results = found if isinstance(found, tuple) else (found,)
    declared = step.operation.outputs
    if len(results) != len(declared):
        raise QcError(f"{step.where} gives {len(results)} results, {len(declared)} are declared", fix=_FIX)
    settled_results = []
    for variable, value in zip(declared, results, strict=True):
        if not variable.type.fits(tuple(value.shape)) or value.dtype is not variable.type.dtype.held:
            held = str(value.dtype).removeprefix("torch.").removesuffix("32")
            what = f"{step.where} gives {held}{list(value.shape)}, declared is {variable.type}"
            raise QcError(what, fix=_FIX)
        settled_results.append(settled(value, variable.type.dtype, mode) if step.rounds else value)
    return tuple(settled_results)


def _check_types(operation: Operation, kernel: Kernel, types: dict[str, TensorType], where: str) -> None:
    """The declared element types are those that the operation gives for its arguments."""
    given = {name: [_type(binding, types) for binding in values] for name, values in operation.arguments.items()}
    tensors = {p.name for p in kernel.parameters if p.kind != "value"}
    floats = {t.dtype.name for name in tensors for t in given.get(name, ()) if t.dtype.kind == "float"}
    if len(floats) > 1 and not kernel.mixed:
        raise QcError(f"{where} mixes {' and '.join(sorted(floats))}", fix=_FIX)
    rules = kernel.results * len(operation.outputs) if len(kernel.results) == 1 else kernel.results
    for variable, rule in zip(operation.outputs, rules, strict=False):
        wanted = _expected(operation, rule, given)
        if wanted is not None and variable.type.dtype.name != wanted:
            what = f"{where} gives {wanted}, declared is {variable.type}"
            raise QcError(what, fix=_FIX)


def _type(binding: Binding, types: dict[str, TensorType]) -> TensorType:
    return types[binding.name] if isinstance(binding, Named) else binding.type


def _expected(operation: Operation, rule: str, given: dict[str, list[TensorType]]) -> str | None:
    if rule in given:
        return given[rule][0].dtype.name
    if rule in DTYPES:
        return rule
    return None  # named by a constant (cast): its value shows when it is computed


def _plan_drops(plan: Plan) -> None:
    """After which step each value is read for the last time."""
    kept = set(plan.function.outputs)
    seen: set[str] = set()
    for step in reversed(plan.steps):
        read = {name for _, sources in step.live for name in sources if isinstance(name, str)}
        made = {variable.name for variable in step.operation.outputs}
        step.drops = tuple(sorted((read | made) - seen - kept))
        seen |= read
