"""Arithmetic: rules N2 to N9 and N12. Those that look at values say nothing of a package that was not run."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from runtimes.lint.subject import Subject, check
from runtimes.mil.precision import SMALLEST_NORMAL
from runtimes.mil.program import Immediate, Named, Stored
from runtimes.mil.quirks import PRODUCT_LIMIT

_SHARE = 0.01
"""Share of subnormal elements from which a tensor is told."""

_EXP = 11.0
_FINITE = 65504.0
_LOOKED_AT = 1 << 20
"""Most elements of a constant that is looked at for infinities."""

Found = Iterator[tuple[str, str]]


@check("N2")
def products(subject: Subject) -> Found:
    if subject.trace is None:
        return
    for op in subject.ops("conv", "linear", "matmul"):
        seen = subject.trace.seen.get(op.name)
        if seen is not None and (seen.largest >= PRODUCT_LIMIT or seen.infinite):
            yield op.name, "is not finite" if seen.infinite else f"reaches {seen.largest:.0f}"


def _squares(subject: Subject) -> Iterator[tuple[str, str]]:
    """(op, what it squares) of every square."""
    for op in subject.ops("mul", "square", "pow"):
        x, y = subject.names(op, "x"), subject.names(op, "y")
        two = op.type == "pow" and subject.constant(op, "y") == 2
        if x and (op.type == "square" or two or (op.type == "mul" and x == y)):
            yield op.name, x[0]


@check("N3")
def squares(subject: Subject) -> Found:
    for name, source in _squares(subject):
        summed = any(reader.type in ("reduce_mean", "reduce_sum") for reader, _ in subject.readers.get(name, ()))
        if summed and not _scaled(subject, source):
            yield name, f"sums squares of {source}"
    for op in subject.ops("reduce_sum_square", "reduce_l2_norm", "l2_norm"):
        for taken in subject.names(op, "x"):
            if not _scaled(subject, taken):
                yield op.name, f"sums squares of {taken}"


def _scaled(subject: Subject, name: str) -> bool:
    """Whether a value was divided by something made of its maximum."""
    maker = subject.makers.get(name)
    if maker is None or maker.type not in ("real_div", "mul"):
        return False
    near = {argument for key in ("x", "y") for argument in subject.names(maker, key)}
    for _ in range(4):
        made = [subject.makers[n] for n in near if n in subject.makers]
        if any(op.type == "reduce_max" for op in made):
            return True
        near = {b.name for op in made for bs in op.inputs.values() for b in bs if isinstance(b, Named)}
    return False


@check("N4")
def silu(subject: Subject) -> Found:
    for op in subject.ops("silu"):
        yield op.name, "is silu"
    for op in subject.ops("mul"):
        for one, other in (("x", "y"), ("y", "x")):
            for name in subject.names(op, one):
                maker = subject.makers.get(name)
                if (
                    maker is not None
                    and maker.type == "sigmoid"
                    and subject.names(maker, "x") == subject.names(op, other)
                ):
                    yield op.name, "is x sigmoid(x), which becomes silu again"


@check("N5")
def subnormal(subject: Subject) -> Found:
    for op in subject.computed():
        epsilon = subject.constant(op, "epsilon")
        if isinstance(epsilon, float) and 0 < epsilon < SMALLEST_NORMAL:
            yield op.name, f"epsilon {epsilon:.2g}"
    for name, seen in subject.trace.seen.items() if subject.trace is not None else ():
        if seen.subnormal_share > _SHARE and name in subject.makers:
            yield name, f"{seen.subnormal_share:.0%} of its elements are below 6.1e-5"


@check("N6")
def slices(subject: Subject) -> Found:
    for op in subject.ops("slice_by_index", "slice_by_size", "split"):
        given = subject.type_of(op, "x")
        if given is None:
            continue
        last = len(given.shape) - 1
        if op.type == "split":
            inside = subject.constant(op, "axis") in (last, -1)
        else:
            begin, masked = subject.constant(op, "begin"), subject.constant(op, "begin_mask")
            computed = begin is None and bool(subject.names(op, "begin"))
            inside = computed or (begin is not None and len(begin) > last and begin[last] != 0)
            inside = inside and not (masked and masked[last]) and not _whole(subject, op.name, given.shape[last], last)
        if inside:
            yield op.name, f"{op.type} begins inside the last axis of {given}"


def _whole(subject: Subject, name: str, length: int | None, axis: int) -> bool:
    """Whether a slice keeps all of an axis: it cannot begin inside it then."""
    made = subject.types[name].shape
    return len(made) == axis + 1 and made[axis] == length


@check("N7")
def sums(subject: Subject) -> Found:
    for op in subject.ops("reduce_sum", "reduce_mean", "reduce_sum_square"):
        if op.outputs[0].type.dtype.kind == "float":
            yield op.name, f"{op.type} adds in fp16"


@check("N8")
def exponentials(subject: Subject) -> Found:
    if subject.trace is None:
        return
    for op in subject.ops("exp", "softplus"):
        for name in subject.names(op, "x"):
            seen = subject.trace.seen.get(name)
            if seen is not None and seen.highest > _EXP:
                yield op.name, f"{op.type} of {seen.highest:.1f}"


@check("N9")
def infinities(subject: Subject) -> Found:
    for op in subject.function.operations:
        bindings = [b for bs in op.arguments.values() for b in bs] + [v for k, v in op.attributes.items() if k == "val"]
        for binding in bindings:
            if not isinstance(binding, (Immediate, Stored)) or binding.type.dtype.kind != "float":
                continue
            value = subject.package.value(binding) if binding.type.count <= _LOOKED_AT else None
            if isinstance(value, Tensor) and value.numel() and bool((value <= -_FINITE).any()):
                yield op.name, f"holds {float(value.min()):g}"


@check("N12")
def contractions(subject: Subject) -> Found:
    for op in subject.ops("conv"):
        weight = subject.type_of(op, "weight")
        made, taken = (weight.shape[0], weight.shape[1]) if weight is not None else (None, None)
        if made and taken and taken >= 2 * made:
            yield op.name, f"{taken} channels to {made}"
