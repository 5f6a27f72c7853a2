"""Weights: rules W1 to W8."""

from __future__ import annotations

import math
from collections.abc import Iterator

from runtimes.lint.subject import Subject, check
from runtimes.mil.program import Operation, Stored
from runtimes.mil.types import TensorType

_TABLE = 256
"""Most values of a vector table."""

_WIDTH = 16
_LOOKUPS = ("constexpr_lut_to_dense", "constexpr_lut_to_sparse")
_SCALES = ("constexpr_blockwise_shift_scale", "constexpr_sparse_blockwise_shift_scale")
Found = Iterator[tuple[str, str]]


def _stored(subject: Subject) -> Iterator[tuple[Operation, TensorType, Stored]]:
    """The constants that lie in files."""
    for op in subject.function.operations:
        for bindings in op.arguments.values():
            for binding in bindings:
                if isinstance(binding, Stored):
                    yield op, binding.type, binding
        value = op.attributes.get("val")
        if isinstance(value, Stored):
            yield op, value.type, value


@check("W1")
def sizes(subject: Subject) -> Found:
    found = {(b.path, b.offset): (op, kind.count * kind.dtype.bits / 8) for op, kind, b in _stored(subject)}
    total = sum(size for _, size in found.values())
    if total > subject.profile.part_bytes:
        yield "", f"{total:.0f} bytes of weights, the most is {subject.profile.part_bytes}"
    for op, size in found.values():
        if subject.on_engine and size > subject.profile.tensor_bytes:
            yield op.name, f"{size:.0f} bytes, the most of a tensor is {subject.profile.tensor_bytes}"


def _lookups(subject: Subject) -> Iterator[tuple[Operation, list[int], int, int]]:
    """Each lookup of CoreML8: its groups by axis, its bits, the width of its vectors."""
    for op in subject.ops(*_LOOKUPS):
        table = subject.type_of(op, "lut")
        if table is not None and table.static and len(table.shape) > 2:
            *groups, entries, width = (n or 1 for n in table.shape)
            yield op, groups, int(math.log2(entries)), width


def unfit_vectors(bits: int, width: int) -> Iterator[str]:
    """What keeps a table of vectors off the engine, by its size."""
    if width > _WIDTH:
        yield f"a vector table {width} wide"
    if 2**bits * width > _TABLE:
        yield f"a vector table of {2**bits * width} values"


@check("W2")
def groups(subject: Subject) -> Found:
    for op, runs, bits, width in _lookups(subject):
        if len(runs) > 1 and runs[1] > 1:
            yield op.name, f"{runs[1]} tables along the input"
        if width > 1:
            axis = subject.constant(op, "vector_axis")
            wrong = {
                "grouped": math.prod(runs) > 1,
                f"along axis {axis}": axis != 0,
            }
            for what in (what for what, broken in wrong.items() if broken):
                yield op.name, f"a vector table {what}"
            yield from ((op.name, found) for found in unfit_vectors(bits, width))
    for op in subject.ops(*_SCALES):
        scale = subject.type_of(op, "scale")
        runs = [n or 1 for n in scale.shape] if scale is not None else []
        if len(runs) > 1 and runs[1] > 1:
            yield op.name, f"{runs[1]} scales along the input"


@check("W3")
def tables(subject: Subject) -> Found:
    for op, runs, _, _ in _lookups(subject):
        if math.prod(runs) > 1:
            yield op.name, f"{math.prod(runs)} tables"


@check("W4")
def scaled_floats(subject: Subject) -> Found:
    for op in subject.ops(*_SCALES):
        data = subject.type_of(op, "data") or subject.type_of(op, "nonzero_data")
        if data is not None and data.dtype.kind == "float":
            yield op.name, f"scales {data}"


@check("W5")
def streamed(subject: Subject) -> Found:
    profile, first = subject.profile, set(subject.profile.chips)
    for op, _, bits, width in _lookups(subject):
        if width == 1 and bits not in profile.lut_bits:
            told = ", ".join(map(str, profile.lut_bits))
            yield op.name, f"{bits}-bit indices; {profile.name} streams {told}"
    for op in subject.ops(*_SCALES, "constexpr_affine_dequantize"):
        scale = subject.type_of(op, "scale")
        blocks = scale is not None and sum((n or 1) > 1 for n in scale.shape) > 1
        if first & {"M1"} or (blocks and first & {"M2"}):
            yield op.name, f"{'blocks' if blocks else 'int8'} are expanded to fp16 on {profile.name}"


@check("W6")
def widths(subject: Subject) -> Found:
    for op, _, bits, _ in _lookups(subject):
        if bits in (3, 6):
            yield op.name, f"{bits}-bit indices"


@check("W7")
def casts(subject: Subject) -> Found:
    for op in subject.ops("constexpr_cast"):
        yield op.name, "casts a weight"


@check("W8")
def shared(subject: Subject) -> Found:
    names = list(subject.package.functions)
    if len(names) > 1 and subject.function.name == names[0]:
        yield "", f"{len(names)} functions: {', '.join(names)}"


@check("N11")
def scaled_tables(subject: Subject) -> Found:
    for op in (*subject.ops(*_SCALES), *subject.ops(*_LOOKUPS)):
        for argument in ("data", "nonzero_data", "lut"):
            for name in subject.names(op, argument):
                if subject.is_constant(name) and subject.makers[name].type != "const":
                    yield op.name, f"takes its {argument} from {subject.makers[name].type} {name}"


@check("T6")
def palettised_state(subject: Subject) -> Found:
    if subject.function.states and any(True for _ in subject.ops(*_LOOKUPS)):
        yield "", "a state and lookup tables"
