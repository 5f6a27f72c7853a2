"""States: rules T1 to T5."""

from __future__ import annotations

from collections.abc import Iterator

from runtimes.lint.subject import Subject, check
from runtimes.mil.program import Named, Operation

Found = Iterator[tuple[str, str]]


def first_reads(subject: Subject) -> dict[str, list[Operation]]:
    """State -> its reads that are no part of an update: an update is saved as a write and a read behind it."""
    found: dict[str, list[Operation]] = {v.name: [] for v in subject.function.states}
    before: Operation | None = None
    for op in subject.function.operations:
        if op.type == "read_state":
            state = subject.names(op, "input")[0]
            updated = before is not None and before.type == "write_state" and subject.names(before, "input") == [state]
            if not updated:
                found[state].append(op)
        before = op
    return found


@check("T1")
def read_once(subject: Subject) -> Found:
    for state, reads in first_reads(subject).items():
        for op in reads[1:]:
            yield op.name, f"reads {state} again"


@check("T2")
def multiples(subject: Subject) -> Found:
    step = subject.profile.state_multiple
    for variable in subject.function.states:
        uneven = [n for n in variable.type.shape[-2:] if n is not None and n % step]
        if uneven:
            yield variable.name, f"{variable.type}: {uneven[0]} is no multiple of {step}"


@check("T3")
def count(subject: Subject) -> Found:
    states = subject.function.states
    if len(states) > subject.profile.max_states:
        yield "", f"{len(states)} states, the most is {subject.profile.max_states}"


@check("T4")
def standing_alone(subject: Subject) -> Found:
    for op in subject.ops("slice_update"):
        if not any(reader.type == "write_state" for reader, _ in subject.readers.get(op.name, ())):
            yield op.name, "is written to no state"


@check("T5")
def past_the_update(subject: Subject) -> Found:
    stale = {op.name for reads in first_reads(subject).values() for op in reads}
    for op in subject.computed():
        read = {b.name for bindings in op.inputs.values() for b in bindings if isinstance(b, Named)}
        if op.type not in ("read_state", "write_state") and read & stale:
            stale |= {v.name for v in op.outputs}
    for name in subject.function.outputs:
        if name in stale:
            yield name, "holds what a state was before its update"
