"""Ops without a path to the engine: rules O1 to O3, N1 and N10."""

from __future__ import annotations

from collections.abc import Iterator

from runtimes.lint.subject import Subject, check
from runtimes.mil.program import Operation

Found = Iterator[tuple[str, str]]

_NEVER = (
    "mod logical_and logical_or logical_xor reduce_prod scatter scatter_nd scatter_along_axis band_part one_hot "
    "non_zero shape reverse_sequence sliding_windows rnn gru lstm make_list list_read list_write list_gather "
    "list_scatter list_length cond while_loop"
)
_FROM_M2 = "topk argsort gather_nd resize resize_bilinear resize_nearest_neighbor crop_resize"
_FROM_M3 = "sin cos reduce_argmin random_normal random_uniform random_bernoulli random_categorical"
_ARGUMENTS = 2048
_PLACES = frozenset({"begin", "end", "size", "shape", "indices", "axis", "axes", "reps", "perm"})
"""Arguments that say where, not what: integers there are no arithmetic of the engine."""


@check("O1")
def without_path(subject: Subject) -> Found:
    if subject.on_engine:
        for op in subject.ops(*_NEVER.split()):
            yield op.name, f"{op.type} never runs on the engine"


@check("O2")
def newer(subject: Subject) -> Found:
    chips = set(subject.profile.chips)
    lacking = _FROM_M2.split() if chips & {"M1", "A14"} else []
    lacking += _FROM_M3.split() if chips & {"M1", "M2", "A14", "A15"} else []
    if subject.on_engine:
        for op in subject.ops(*lacking):
            yield op.name, f"{subject.profile.name} has no {op.type}"


@check("O3")
def argument_reductions(subject: Subject) -> Found:
    for op in subject.ops("reduce_argmax", "reduce_argmin"):
        given, axis = subject.type_of(op, "x"), subject.constant(op, "axis")
        length = given.shape[-1 if axis is None else axis] if given else None
        if length is not None and length > _ARGUMENTS:
            yield op.name, f"{length} elements, the most is {_ARGUMENTS}"


@check("N1")
def narrow(subject: Subject) -> Found:
    if not subject.on_engine:
        return
    for op in subject.computed():
        for variable in op.outputs:
            dtype = variable.type.dtype
            if dtype.name == "fp16" or variable.name in subject.function.outputs or _only_says_where(subject, op):
                continue
            yield variable.name, f"{op.type} gives {variable.type}"


def _only_says_where(subject: Subject, op: Operation) -> bool:
    """Whether an integer ends up in arguments that say where, over integer ops."""
    if any(v.type.dtype.kind != "int" for v in op.outputs):
        return False
    for variable in op.outputs:
        for reader, argument in subject.readers.get(variable.name, ()):
            if argument not in _PLACES and not _only_says_where(subject, reader):
                return False
    return True


@check("N10")
def fused_attention(subject: Subject) -> Found:
    for op in subject.ops("scaled_dot_product_attention"):
        yield op.name, "is fused attention"
