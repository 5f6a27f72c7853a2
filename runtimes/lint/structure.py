"""Shapes and structure: rules S1 to S11."""

from __future__ import annotations

from collections.abc import Iterator

from runtimes.lint.subject import Subject, check
from runtimes.mil.program import Named, Operation
from runtimes.mil.types import TensorType

_BRANCHES = 12
_LANES = 32
Found = Iterator[tuple[str, str]]


def _values(subject: Subject) -> Iterator[tuple[str, TensorType]]:
    """Everything that is computed or given."""
    for variable in (*subject.function.inputs, *subject.function.states):
        yield variable.name, variable.type
    for op in subject.computed():
        for variable in op.outputs:
            yield variable.name, variable.type


@check("S1")
def rank(subject: Subject) -> Found:
    for name, kind in _values(subject):
        if len(kind.shape) > subject.profile.max_rank:
            yield name, f"{kind} has {len(kind.shape)} axes of {subject.profile.max_rank}"


@check("S2")
def lengths(subject: Subject) -> Found:
    """The last two axes are height and width, the third from the end the channels."""
    most, channels = subject.profile.max_dim, subject.profile.max_channels
    for name, kind in _values(subject):
        for place, length in enumerate(reversed(kind.shape)):
            limit = channels if place == 2 else most
            if length is not None and length > limit:
                yield name, f"{kind} has a length of {length}, the most is {limit}"
                break


@check("S3")
def fixed(subject: Subject) -> Found:
    for name, kind in _values(subject):
        if not kind.static:
            yield name, f"{kind} is not fixed"


@check("S4")
def lanes(subject: Subject) -> Found:
    if not subject.on_engine:
        return
    outside = {v.name for v in subject.function.inputs} | set(subject.function.outputs)
    for name in sorted(outside):
        kind = subject.types[name]
        last = kind.shape[-1] if kind.shape else None
        if kind.dtype.kind == "float" and last is not None and last % _LANES:
            yield name, f"{kind} is padded to {-(-last // _LANES) * _LANES}"


@check("S5")
def layout(subject: Subject) -> Found:
    for op in subject.ops("linear", "matmul"):
        argument = "weight" if op.type == "linear" else "y"
        names = subject.names(op, argument)
        if op.type == "linear" or (names and subject.is_constant(names[0])):
            yield op.name, f"{op.type} with a stored weight"


@check("S6")
def kernel(subject: Subject) -> Found:
    for op in subject.ops("conv"):
        weight = subject.type_of(op, "weight")
        width = weight.shape[-1] if weight else None
        if width is not None and width > subject.profile.kernel_width:
            yield op.name, f"a kernel {width} wide, the most is {subject.profile.kernel_width}"


@check("S7")
def resident(subject: Subject) -> Found:
    if not subject.on_engine:
        return
    most = subject.profile.resident_bytes
    for name, kind in _values(subject):
        size = kind.count * kind.dtype.bits // 8 if kind.static else 0
        if size > most:
            yield name, f"{kind} has {size} bytes, {most} stay on the chip"


@check("S8")
def branches(subject: Subject) -> Found:
    for op in subject.computed():
        for bindings in op.inputs.values():
            joined = {b.name for b in bindings if isinstance(b, Named) and not subject.is_constant(b.name)}
            if len(joined) >= _BRANCHES:
                yield op.name, f"{op.type} joins {len(joined)} branches"


def _made(op: Operation) -> int | None:
    return op.outputs[0].type.shape[1]


@check("S9")
def rows(subject: Subject) -> Found:
    for op in subject.ops("conv"):
        made = _made(op)
        if made is not None and made > subject.profile.head_rows:
            yield op.name, f"{made} outputs, the most is {subject.profile.head_rows}"


@check("S10")
def returned(subject: Subject) -> Found:
    outputs = list(subject.function.outputs)
    for name in sorted({name for name in outputs if outputs.count(name) > 1}):
        yield name, "is returned twice"
    for op in subject.ops("identity"):
        source = subject.names(op, "x")
        if op.name in outputs and source and source[0] in outputs:
            yield op.name, f"is the identity of the output {source[0]}"


@check("S11")
def keys(subject: Subject) -> Found:
    for op in subject.ops("softmax"):
        axis = subject.constant(op, "axis")
        length = op.outputs[0].type.shape[-1 if axis is None else axis]
        if length is not None and length > subject.profile.softmax_keys:
            yield op.name, f"{length} keys, the most is {subject.profile.softmax_keys}"
