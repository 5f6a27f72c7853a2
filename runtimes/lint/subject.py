"""A saved function as the checks look at it: who makes a value, who reads it, what is constant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from runtimes.ane.profile import Profile
from runtimes.mil import Package, Trace
from runtimes.mil.program import Function, Immediate, Named, Operation, Stored
from runtimes.mil.types import TensorType


@dataclass(frozen=True)
class Violation:
    """What breaks a rule, and where."""

    rule: str
    file: str
    function: str
    op: str
    found: str


@dataclass
class Subject:
    """One function of a package, for one profile."""

    package: Package
    function: Function
    profile: Profile
    role: str | None = None
    """embed, chunk, head or encoder, where an export says so."""

    trace: Trace | None = None
    """What its tensors were like in fp16 mode; None where it was not run."""

    types: dict[str, TensorType] = field(init=False)

    def __post_init__(self) -> None:
        self.types = self.function.types()

    @property
    def on_engine(self) -> bool:
        """Whether it is meant for the engine; embeddings are looked up by the CPU."""
        return self.role != "embed"

    @cached_property
    def makers(self) -> dict[str, Operation]:
        """Name -> the op that makes it."""
        return {v.name: op for op in self.function.operations for v in op.outputs}

    @cached_property
    def readers(self) -> dict[str, list[tuple[Operation, str]]]:
        """Name -> the ops that read it, and as which argument."""
        found: dict[str, list[tuple[Operation, str]]] = {}
        for op in self.function.operations:
            for argument, bindings in op.inputs.items():
                for binding in bindings:
                    if isinstance(binding, Named):
                        found.setdefault(binding.name, []).append((op, argument))
        return found

    def ops(self, *types: str) -> Iterator[Operation]:
        """The ops of these types."""
        return (op for op in self.function.operations if op.type in types)

    def computed(self) -> Iterator[Operation]:
        """The ops that are no constants."""
        return (op for op in self.function.operations if not is_weight(op))

    def names(self, op: Operation, argument: str) -> list[str]:
        """The names given for an argument."""
        return [b.name for b in op.inputs.get(argument, ()) if isinstance(b, Named)]

    def type_of(self, op: Operation, argument: str) -> TensorType | None:
        """The type of an argument that is one value."""
        given = op.arguments.get(argument, ())
        if len(given) != 1:
            return None
        return self.types[given[0].name] if isinstance(given[0], Named) else given[0].type

    def constant(self, op: Operation, argument: str) -> Any:
        """The value of a constant argument as plain numbers; None where it is computed, or not given."""
        given = op.arguments.get(argument, ())
        if len(given) != 1:
            return None
        source = given[0]
        if isinstance(source, Named):
            maker = self.makers.get(source.name)
            if maker is None or maker.type != "const":
                return None
            source = maker.attributes["val"]
        value = self.package.value(source) if isinstance(source, (Immediate, Stored)) else None
        return value.tolist() if isinstance(value, Tensor) else value

    def is_constant(self, name: str) -> bool:
        """Whether a value is stored, not computed when the function runs."""
        maker = self.makers.get(name)
        return maker is not None and is_weight(maker)

    def violation(self, rule: str, op: str, found: str) -> Violation:
        """Something that breaks a rule."""
        return Violation(rule, self.package.folder.name, self.function.name, op, found)


def is_weight(op: Operation) -> bool:
    """Whether an op is part of what is stored."""
    return op.type == "const" or op.type.startswith("constexpr_")


Check = Callable[[Subject], Iterator[Violation]]
CHECKS: dict[str, Check] = {}


def check(rule: str) -> Callable[[Callable[[Subject], Iterator[tuple[str, str]]]], Check]:
    """Enter the check of a rule: it gives op and what was found."""

    def enter(function: Callable[[Subject], Iterator[tuple[str, str]]]) -> Check:
        assert rule not in CHECKS, f"{rule} is checked twice"

        def run(subject: Subject) -> Iterator[Violation]:
            for op, found in function(subject):
                yield subject.violation(rule, op, found)

        CHECKS[rule] = run
        return run

    return enter
