"""YAML text as a tree in which every key and every value knows its place."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from recipes.mistakes import Mistakes, Place
from recipes.syntax import explain

Scalar: TypeAlias = str | int | float | bool | None

DEEPEST = 50
"""Levels of nesting; no recipe needs more."""

WORDS: dict[str, Scalar] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
INTEGER = re.compile(r"[-+]?[0-9]{1,30}|0o[0-7]{1,40}|0x[0-9a-fA-F]{1,30}")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass
class Node:
    """A value of the document."""

    value: Scalar | dict[str, Node] | list[Node]
    place: Place
    key: Place
    """The place of its key; of the value itself, where it has none."""

    bad: bool = False
    """Whether a mistake in it was already told."""

    @property
    def map(self) -> dict[str, Node]:
        """Its entries; none if it is no map."""
        return self.value if isinstance(self.value, dict) else {}

    @property
    def list(self) -> list[Node]:
        """Its items; none if it is no list."""
        return self.value if isinstance(self.value, list) else []

    def plain(self) -> Any:
        """Without places."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        return [node.plain() for node in self.value] if isinstance(self.value, list) else self.value


class Unreadable(Exception):
    """The text cannot be read on from here; the mistake is told."""


def parse(text: str, start: Place, mistakes: Mistakes) -> Node:
    """The tree of a YAML 1.2 document; raise Unreadable if there is none to go on with."""
    return _Builder(text, start, mistakes).document()


class _Builder:
    def __init__(self, text: str, start: Place, mistakes: Mistakes):
        self.text, self.start, self.mistakes = text, start, mistakes
        self.last = start
        self.events = self._events()

    def document(self) -> Node:
        node: Node | None = None
        for event in self.events:
            if isinstance(event, DocumentStartEvent) and node is not None:
                self.mistakes.add(
                    self.last, "a second document begins here", "a recipe is one document; take out '---'"
                )
                break
            if isinstance(event, NodeEvent):
                node = self.node(event, None, 0)
        return node if node is not None else Node(None, self.start, self.start)

    def _events(self) -> Iterator[Event]:
        """The parser's events; ``last`` is the place of the newest. Its complaints become mistakes."""
        try:
            for event in YAML(typ="safe", pure=True).parse(self.text):
                self.last = self.place(event.start_mark)
                yield event
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            what, fix = explain(error, self.text)
            self.mistakes.add(self.place(mark) if mark else self.last, what, fix)
            raise Unreadable from None
        except (YAMLError, OverflowError, ValueError) as error:
            self.mistakes.add(self.last, f"this is not YAML: {str(error).splitlines()[0]}", "correct what follows here")
            raise Unreadable from None

    def place(self, mark: Any) -> Place:
        if not self.start.line:
            return self.start
        return Place(self.start.file, mark.line + 1, mark.column + 1, self.start.folder)

    def node(self, event: Event, key: Place | None, depth: int) -> Node:
        """The node that ``event`` begins."""
        place = self.last
        if depth > DEEPEST:
            self.mistakes.add(
                place, f"more than {DEEPEST} levels of nesting", "a recipe needs five; check the brackets"
            )
            raise Unreadable
        node = Node(None, place, key or place)
        self.refuse_marks(event, node)
        if isinstance(event, ScalarEvent):
            node.value = self.scalar(event, node)
        elif isinstance(event, SequenceStartEvent):
            items: list[Node] = []
            while not isinstance(inner := next(self.events), SequenceEndEvent):
                items.append(self.node(inner, None, depth + 1))
            node.value = items
        elif isinstance(event, MappingStartEvent):
            node.value = self.entries(depth)
        return node

    def refuse_marks(self, event: Event, node: Node) -> None:
        fix = "write the value out; whole recipes are shared with extends:, parts of them with include:"
        if isinstance(event, AliasEvent):
            self.mistakes.add(node.place, f"recipes have no aliases (*{event.anchor})", fix)
            node.bad = True
        elif isinstance(event, NodeEvent) and event.anchor:
            self.mistakes.add(node.place, f"recipes have no anchors (&{event.anchor})", fix)
        tag = event.tag if isinstance(event, (ScalarEvent, CollectionStartEvent)) else None
        if tag:
            self.mistakes.add(node.place, f"recipes have no tags ({tag})", "write the value alone")
            node.bad = True

    def entries(self, depth: int) -> dict[str, Node]:
        found: dict[str, Node] = {}
        while not isinstance(event := next(self.events), MappingEndEvent):
            at = self.last
            named = isinstance(event, ScalarEvent)
            name = event.value if isinstance(event, ScalarEvent) else ""
            if not named:
                self.mistakes.add(at, "a key is one word, not a list or a map", "write `key: value`")
                self.node(event, None, depth + 1)
            elif name == "<<":
                self.mistakes.add(at, "recipes have no merge keys (<<)", "use extends: or include:")
            value = self.node(next(self.events), at, depth + 1)
            if name in found:
                first = found[name].key
                where = f"line {first.line}" if first.line else "the same value"
                self.mistakes.add(
                    at, f"{name!r} is here a second time; it is already in {where}", "keep one of the two"
                )
            elif named and name != "<<":
                found[name] = value
        return found

    def scalar(self, event: ScalarEvent, node: Node) -> Scalar:
        """By the core schema of YAML 1.2: ``yes`` and ``on`` are text, ``1e-4`` is a number."""
        text: str = event.value
        if not event.implicit[0]:
            return text
        if text in WORDS:
            return WORDS[text]
        if INTEGER.fullmatch(text):
            return int(text, 0 if text[:2] in ("0o", "0x") else 10)
        if not (FLOAT.fullmatch(text) or NOT_FINITE.fullmatch(text)):
            return text
        number = float(text) if FLOAT.fullmatch(text) else math.inf
        if not math.isfinite(number):
            self.mistakes.add(node.place, f"{text[:20]} is not a finite number", "write a number such as 0.001")
            node.bad = True
        return number
