"""The passes of a recipe: which they are, what they are called, and whether their order is legal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields

from graph.errors import QcError
from passes import registry
from recipes.document import Node
from recipes.kinds import fields_at
from recipes.limits import is_data
from recipes.mistakes import Mistakes, nearest
from recipes.paths import resolve_data, resolve_option
from recipes.schema import PassStep
from recipes.section import read
from recipes.selectors import check_selectors
from recipes.shorthand import write_out_data
from recipes.words import said

BESIDE = ("name", "on")
"""Keys that stand beside the pass in its step, not among its options."""

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


class Steps:
    """Reads the steps of one recipe; remembers the names that are taken."""

    def __init__(self, mistakes: Mistakes) -> None:
        self.mistakes = mistakes
        self.taken: dict[str, Node] = {}
        self.astray = False
        """Whether a step was mistaken: what the later ones would meet is not known."""

    def reserve(self, lists: Sequence[Node]) -> None:
        """Take the names that are written, before any is made up."""
        for step in (step for one in lists for step in one.list):
            name = step.map.get("name")
            if name is None or not self.is_name(name, "the name of a step"):
                continue
            word = str(name.value)
            if word in self.taken:
                what = f"two steps are called {word!r}; the other is {self.taken[word].place}"
                self.mistakes.add(name.place, what, "give each step a name of its own")
            self.taken.setdefault(word, name)

    def is_name(self, node: Node, what: str) -> bool:
        """Whether a node holds a name; if not, the mistake is told."""
        if isinstance(node.value, str) and NAME.fullmatch(node.value):
            return True
        fix = "write letters, digits, - and _, so that --set can use it"
        self.mistakes.add(node.place, f"{what} cannot be {said(node.value)}", fix)
        return False

    def read(self, passes: Node) -> tuple[PassStep, ...]:
        """The steps of one list, up to the first of the recipe that is mistaken."""
        if passes.value is None:
            return ()
        if not isinstance(passes.value, list):
            fix = "begin each pass with '- '" if passes.map else f"write [{passes.value}]"
            self.mistakes.add(passes.place, f"passes needs a list, not {said(passes.value)}", fix)
            self.astray = True
            return ()
        steps = []
        for node in passes.value:
            known = len(self.mistakes)
            step = self._step(node)
            self.astray = self.astray or step is None or len(self.mistakes) > known
            if step is not None and not self.astray:
                steps.append(step)
        return tuple(steps)

    def _step(self, node: Node) -> PassStep | None:
        kind = self._kind(node)
        if kind is None:
            return None
        name = self._name(kind, node)
        try:
            cls = registry.find(kind)
        except QcError as error:
            self.mistakes.add(node.map[kind].key, error.what, error.fix)
            return None
        options = node.map[kind]
        if options.value is None:
            options = Node({}, options.key, options.key)
        for key in BESIDE:
            if key in options.map and key not in fields_at(cls, ()):
                what = f"{key} is no option of {kind}; it stands beside it"
                self.mistakes.add(options.map.pop(key).key, what, f"write {key}: below the {kind}:, as deep as that")
        check_selectors(cls, options, kind, self.mistakes)
        for option in fields(cls):
            if option.metadata.get("path") and option.name in options.map:
                resolve_option(options.map[option.name], f"{kind}.{option.name}", self.mistakes)
            if is_data(option) and option.name in options.map and not options.map[option.name].bad:
                write_out_data(options.map[option.name], f"{kind}.{option.name}", self.mistakes)
                resolve_data(options.map[option.name], f"{kind}.{option.name}", self.mistakes)
        on = node.map["on"].value if "on" in node.map else None
        if (step := read(cls, options, kind, self.mistakes)) is None:
            return None
        lines = {key: str(option.key) for key, option in options.map.items()}
        on = on if isinstance(on, str) else None
        return PassStep(step=step, kind=kind, name=name, on=on, line=str(node.map[kind].key), options_lines=lines)

    def _kind(self, node: Node) -> str | None:
        """The pass that a step names."""
        kinds = [key for key in node.map if key not in BESIDE]
        if len(kinds) == 1:
            return kinds[0]
        known = registry.names()
        passes = [key for key in kinds if key in known]
        if not kinds:
            what = f"a step needs a pass, not {said(node.value)}" if not node.map else "this step names no pass"
            self.mistakes.add(node.place, what, f"write `- NAME: {{OPTIONS}}`; the passes are {', '.join(known)}")
        elif len(passes) > 1:
            second = node.map[passes[1]]
            what = f"one step cannot be both {passes[0]} and {passes[1]}"
            self.mistakes.add(second.key, what, f"begin {passes[1]} with '- '")
        else:
            self._stray(kinds, passes[0] if passes else kinds[0], node)
        return None

    def _stray(self, kinds: Sequence[str], kind: str, node: Node) -> None:
        """Keys beside a pass that are neither options nor ``name`` or ``on``."""
        try:
            options = fields_at(registry.find(kind), ())
        except QcError as error:
            self.mistakes.add(node.map[kind].key, error.what, error.fix)
            options = []
        for key in kinds:
            if key == kind:
                continue
            fix = f"indent {key} deeper than {kind}" if key in options else f"only {' and '.join(BESIDE)} stand there"
            near = nearest(key, [*BESIDE, *registry.names()])
            fix = f"did you mean {near!r}?" if near and key not in options else fix
            self.mistakes.add(node.map[key].key, f"{key!r} stands beside {kind}, not among its options", fix)

    def _name(self, kind: str, node: Node) -> str:
        if "name" in node.map and isinstance(node.map["name"].value, str):
            return node.map["name"].value
        number, name = 1, kind
        while name in self.taken:
            number += 1
            name = f"{kind}-{number}"
        self.taken[name] = node
        return name


def check_order(passes: Node, mistakes: Mistakes) -> None:
    """Tell every pass that comes later than one that must have the last word over it."""
    steps = [(kind, step) for step in passes.list for kind in step.map if kind not in BESIDE]
    for i, (early, first) in enumerate(steps):
        try:
            last_word = registry.find(early).after
        except QcError:  # told when the step was read
            continue
        for late, second in steps[i + 1 :]:
            models = {str(step.map["on"].value) if "on" in step.map else "" for step in (first, second)}
            if late in last_word and (len(models) == 1 or "*" in models):
                what = f"{late} comes after {early} ({first.map[early].key}), which is too late"
                mistakes.add(second.map[late].key, what, f"move {late} before {early}")
