"""From the tree of a recipe to the Recipe: each part on its own, so that a mistake in one hides none in the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from recipes import checks
from recipes.document import Node
from recipes.mistakes import Mistakes, nearest
from recipes.questions import check_questions
from recipes.schema import Header, PassStep, Recipe, Stage, Work
from recipes.section import read
from recipes.selectors import check_selector
from recipes.sentences import unknown
from recipes.settings import Export, Gate
from recipes.shorthand import workers
from recipes.steps import Steps, check_order
from recipes.words import said
from runtimes.assess_settings import Assess, Audit
from runtimes.settings import Cache, Evaluate, Train

T = TypeVar("T")

HEADER = [field.name for field in fields(Header)]
WORK = [field.name for field in fields(Work)]
KEYS = [*HEADER, *WORK, "cache", "stages"]


def build(root: Node, file: Path, mistakes: Mistakes) -> Recipe:
    """The recipe of a tree; what could not be read is told and left out."""
    _check_keys(root, KEYS, "the recipe", mistakes)
    part = Node({key: node for key, node in root.map.items() if key in HEADER}, root.place, root.key)
    header = read(Header, part, "", mistakes) or Header()
    _check_model(root, mistakes)
    reader = _Reader(root, mistakes)
    stages = reader.stages()
    work = reader.work(root)
    if header.name and (set("/\\\0") & set(header.name) or header.name.startswith(".")):
        what = f"the recipe cannot be called {said(header.name)}"
        mistakes.add(root.map["name"].place, what, "write a name that a folder can have, without /")
    values = {key: getattr(header, key) for key in HEADER}
    cache = reader.one(Cache, root, "cache")
    return Recipe(**{**values, **work, "name": header.name or file.stem}, cache=cache, stages=stages, file=file)


def _check_keys(node: Node, known: Sequence[str], where: str, mistakes: Mistakes) -> None:
    for key, value in node.map.items():
        if key not in known:
            mistakes.add(value.key, *unknown(key, known, where))


def _check_model(root: Node, mistakes: Mistakes) -> None:
    has = [key for key in ("model", "models") if key in root.map and root.map[key].value is not None]
    typo = any(nearest(key, ("model", "models")) for key in root.map if key not in KEYS)
    if not has and not typo:
        mistakes.lack(root.place, "the recipe has no model", "add model: seedling, a folder, or hf:org/name")
    if len(has) > 1:
        mistakes.add(
            root.map["models"].key, "the recipe has both model and models", "keep one; null clears an inherited one"
        )
    if "models" in has and root.map["models"].value == {}:
        mistakes.add(root.map["models"].place, "models is empty", "write models: {NAME: {model: FOLDER}}")


class _Reader:
    def __init__(self, root: Node, mistakes: Mistakes) -> None:
        self.root, self.mistakes = root, mistakes
        self.joined = False
        self.steps = Steps(mistakes)
        self.steps.reserve([work.map["passes"] for work in workers(root) if "passes" in work.map])

    def stages(self) -> tuple[Stage, ...]:
        node = self.root.map.get("stages")
        if node is None or node.value is None:
            return ()
        flat = [key for key in WORK if key in self.root.map and self.root.map[key].value is not None]
        for key in flat:
            what = f"{key} stands beside stages"
            self.mistakes.add(self.root.map[key].key, what, f"move {key} into one of the stages")
        stages = self.items(node, "stages", "stage")
        checks.check_same_names(stages, "stages", self.mistakes)
        checks.check_starts(stages, self.mistakes)
        read = [self.stage(one) for one in stages]
        return tuple(stage for stage in read if stage is not None)

    def stage(self, node: Node) -> Stage | None:
        if not node.map:
            self.mistakes.add(node.place, f"a stage needs a map, not {said(node.value)}", "write - name: NAME")
            self.steps.astray = True
            return None
        _check_keys(node, ["name", "start", *WORK], "the stage", self.mistakes)
        work = self.work(node)
        if "name" not in node.map:
            self.mistakes.lack(node.place, "the stage has no 'name', which it needs", "add name: to the stage")
            self.steps.astray = True
            return None
        is_name = self.steps.is_name(node.map["name"], "the name of a stage")
        self.steps.astray = self.steps.astray or not is_name
        start = node.map["start"].value if "start" in node.map else None
        said_start = start if isinstance(start, str) else None
        return Stage(name=str(node.map["name"].value), start=said_start, **work) if is_name else None

    def work(self, node: Node) -> dict[str, Any]:
        """The fields of Work that a stage, or the recipe itself, has."""
        checks.check_data(node, self.mistakes)
        train = self.one(Train, node, "train")
        evaluate = self.one(Evaluate, node, "evaluate")
        audit, assess = self.one(Audit, node, "audit"), self.one(Assess, node, "assess")
        if train:
            checks.check_train(train, node.map["train"], self.mistakes)
            checks.check_cached(train, node.map["train"], self.root.map.get("cache"), self.mistakes)
        self.check_groups(node)
        self.joined = checks.check_models(node, self.root.map.get("models"), self.joined, self.mistakes)
        checks.check_evaluate(node, self.root.map.get("cache"), self.mistakes)
        check_questions(node, self.mistakes)
        gates = self.many(Gate, node, "require", "gate")
        for gate, at in gates:
            checks.check_gate(gate, at, self.mistakes)
            checks.check_produced(gate, at, node, evaluate, self.mistakes)
        exports = self.many(Export, node, "export", "export")
        if "export" in node.map:
            checks.check_exports(node.map["export"], self.mistakes)
        return {
            "passes": self.passes(node),
            "audit": audit,
            "assess": assess,
            "train": train,
            "evaluate": evaluate,
            "require": tuple(gate for gate, _ in gates),
            "export": tuple(export for export, _ in exports),
        }

    def passes(self, node: Node) -> tuple[PassStep, ...]:
        if "passes" not in node.map:
            return ()
        steps = self.steps.read(node.map["passes"])
        check_order(node.map["passes"], self.mistakes)
        return steps

    def check_groups(self, node: Node) -> None:
        groups = node.map["train"].map.get("groups") if "train" in node.map else None
        for name, group in groups.map.items() if groups else ():
            if "select" in group.map:
                check_selector(group.map["select"], f"train.groups.{name}.select", self.mistakes)
        snap = node.map["train"].map.get("auto_snap") if "train" in node.map else None
        if snap and "select" in snap.map:
            check_selector(snap.map["select"], "train.auto_snap.select", self.mistakes)

    def one(self, kind: type[T], work: Node, key: str) -> T | None:
        node = work.map.get(key)
        return None if node is None or node.value is None else read(kind, node, key, self.mistakes)

    def many(self, kind: type[T], work: Node, key: str, called: str) -> list[tuple[T, Node]]:
        node = work.map.get(key)
        if node is None or node.value is None:
            return []
        read_ = [(read(kind, item, called, self.mistakes), item) for item in self.items(node, key, called)]
        return [(one, item) for one, item in read_ if one is not None]

    def items(self, node: Node, key: str, called: str) -> list[Node]:
        if isinstance(node.value, list):
            return node.value
        fix = f"begin each {called} with '- '"
        self.mistakes.add(node.place, f"{key} needs a list, not {said(node.value)}", fix)
        return []
