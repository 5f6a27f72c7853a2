"""What a mistake is, and its fix, in a sentence each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from pydantic_core import ErrorDetails

from graph.select import Selector
from recipes.document import Node
from recipes.kinds import doc_at, fields_at
from recipes.mistakes import Place, nearest
from recipes.words import BOUNDS, KINDS, UNKNOWN, as_meant, choices, elsewhere, said

Sentence: TypeAlias = tuple[Place, str, str]
"""Where, what, fix."""


@dataclass(frozen=True)
class Finding:
    """One of pydantic's errors, and where in the document it is."""

    error: ErrorDetails
    node: Node
    keys: tuple[str | int, ...]
    """The way to the node."""

    labels: tuple[str | int, ...]
    """What pydantic adds to the way: names of union branches, and of a key that is missing."""

    @property
    def is_lack(self) -> bool:
        """Whether a key is missing; what is missing in a list has a number."""
        return self.error["type"] == "missing" and bool(self.labels) and isinstance(self.labels[-1], str)

    @property
    def context(self) -> dict[str, Any]:
        """The figures of the error."""
        return self.error.get("ctx") or {}


def spot(finding: Finding, named: str) -> str:
    """``train.groups.lora.lr``; list items go by the name of their list."""
    return ".".join(key for key in (named, *finding.keys) if key and isinstance(key, str))


def sentence(findings: Sequence[Finding], kind: type[Any], named: str) -> Sentence:
    """The sentence for one error, or for what all branches of a union say of one value."""
    first, where = findings[0], spot(findings[0], named)
    mismatches = list(dict.fromkeys(KINDS[one.error["type"]] for one in findings if one.error["type"] in KINDS))
    literals = [one for one in findings if one.error["type"] == "literal_error"]
    if literals:
        return first.node.place, f"{where} cannot be {said(first.node.value)}", _choose(literals[0], mismatches)
    if mismatches:
        return _mismatch(first, where, mismatches, doc_at(kind, first.keys))
    if first.error["type"] in UNKNOWN:
        *owner, key = first.keys
        path = ".".join(name for name in (named, *owner) if name and isinstance(name, str))
        return first.node.key, *unknown(str(key), fields_at(kind, owner, first.labels), path)
    return first.node.place, *_limit(first, kind, named)


def unknown(key: str, known: Sequence[str], where: str) -> tuple[str, str]:
    """What to say of a key that ``where`` does not have."""
    near, home = nearest(key, known), elsewhere(key)
    fix = f"{where} has {', '.join(known)}"
    if home:
        fix = f"{key} belongs in {home}"
    elif near:
        fix = f"did you mean {near!r}?"
    return f"{where} has no {key!r}", fix


def _mismatch(finding: Finding, where: str, kinds: list[str], doc: str) -> Sentence:
    wanted, value, place = " or ".join(kinds), finding.node.value, finding.node.place
    if value is None:
        return place, f"{where} is empty; it needs {wanted}", f"write {wanted}, or take the key out"
    fix = as_meant(value, kinds) or (f"write {wanted}: {doc}" if doc else f"write {wanted}")
    if isinstance(value, str) and finding.context.get("class_name") == Selector.__name__:
        fix = f"write {{role: {value}}} or {{name: {value}}}"
    return place, f"{where} needs {wanted}, not {said(value)}", fix


def _choose(finding: Finding, also: list[str]) -> str:
    """One of the values that are allowed, or of the kinds of value that are allowed as well."""
    known, value = choices(finding.error), finding.node.value
    near = nearest(value, known) if isinstance(value, str) else None
    if near:
        return f"did you mean {near!r}?"
    wanted = f"one of {', '.join(known)}" if len(known) > 1 else known[0]
    quotes = "; put <, > and = in quotes" if value == "" and ">" in known else ""
    return f"write {' or '.join([wanted, *also])}{quotes}"


def _limit(finding: Finding, kind: type[Any], named: str) -> tuple[str, str]:
    """A value of the right kind that is out of its bounds."""
    error, where, shown = finding.error["type"], spot(finding, named), said(finding.node.value)
    if error in ("too_long", "too_short", "missing"):
        count = len(finding.node.list)
        return f"{where} has {count} item{'s' * (count != 1)}", _length(finding)
    if error in BOUNDS:
        words, fix = BOUNDS[error]
        (limit,) = (value for key, value in finding.context.items() if key in ("gt", "ge", "lt", "le"))
        return f"{where} must be {words} {limit:g}, not {shown}", f"write {fix} {limit:g}"
    if error == "string_too_short":
        return f"{where} is empty", "write a value, or take the key out"
    doc = doc_at(kind, finding.keys)
    if error == "string_pattern_mismatch":
        return (
            f"{where} cannot be {shown}",
            f"write a {doc}" if doc else f"write text of the form {finding.context.get('pattern')}",
        )
    why = str(finding.context["error"]) if "error" in finding.context else finding.error["msg"]
    known = ", ".join(fields_at(kind, finding.keys[:-1]))
    return f"{where}: {why[:1].lower()}{why[1:]}", doc or f"the options of {named} are {known}"


def _length(finding: Finding) -> str:
    if "max_length" in finding.context:
        return f"write {finding.context['max_length']} at most"
    needed = finding.context.get("min_length") or int(finding.error["loc"][-1]) + 1
    return f"write {needed} at least"
