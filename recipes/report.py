"""pydantic's errors, told at the places where they were made: each once, and of a union only the closest branch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic_core import ErrorDetails

from recipes.document import Node
from recipes.mistakes import Mistakes, nearest
from recipes.sentences import Finding, sentence, spot
from recipes.words import KINDS, UNKNOWN


def report(errors: Sequence[ErrorDetails], kind: type[Any], node: Node, named: str, mistakes: Mistakes) -> None:
    """Tell the errors of reading ``node`` as a ``kind``; ``named`` is what messages call it."""
    findings = [_find(error, node) for error in errors]
    for keys in dict.fromkeys(finding.keys for finding in findings):
        here = [one for one in findings if one.keys == keys and not one.node.bad]
        if any(one.keys[: len(keys)] == keys != one.keys for one in findings):  # a branch of a union got further
            here = [one for one in here if one.error["type"] not in KINDS]
        typos = [str(one.keys[-1]) for one in findings if one.error["type"] in UNKNOWN and one.keys[:-1] == keys]
        _tell(here, typos, kind, named, mistakes)


def _find(error: ErrorDetails, root: Node) -> Finding:
    keys: list[str | int] = []
    labels: list[str | int] = []
    node = root
    for step in error["loc"][1:]:
        if isinstance(step, str) and step in node.map:
            node = node.map[step]
            keys.append(step)
        elif isinstance(step, int) and step < len(node.list):
            node = node.list[step]
            keys.append(step)
        else:
            labels.append(step)
    return Finding(error, node, tuple(keys), tuple(labels))


def _tell(here: Sequence[Finding], typos: Sequence[str], kind: type[Any], named: str, mistakes: Mistakes) -> None:
    """Tell the mistakes of one place; a key that is only misspelt is not missing as well."""
    lacking = [one for one in here if one.is_lack]
    for one in lacking:
        key, owner = str(one.labels[-1]), spot(one, named)
        if not any(nearest(typo, [key]) for typo in typos):
            mistakes.lack(one.node.place, f"{owner} has no {key!r}, which it needs", f"add {key}: to {owner}")
    alternatives = [one for one in here if one.error["type"] in KINDS or one.error["type"] == "literal_error"]
    if alternatives:
        mistakes.add(*sentence(alternatives, kind, named))
    for one in here:
        if one not in lacking and one not in alternatives:
            mistakes.add(*sentence([one], kind, named))
