"""``--set train.steps=100``: values from the command line, put where the recipe would have them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TypeAlias

from graph.errors import QcError
from recipes.document import Node, Unreadable, parse
from recipes.mistakes import Mistakes, Place, nearest
from recipes.schema import Recipe, Work
from recipes.shorthand import workers
from recipes.words import said

KEYS = [field.name for field in fields(Recipe) if field.name != "file"]
WORK_KEYS = [field.name for field in fields(Work)]
BESIDE = ("name", "on")
OPEN = ("groups", "models")
"""Maps whose keys the recipe makes up: a typo there would add an entry instead of failing."""

Overrides: TypeAlias = Mapping[str, object] | Iterable[str]


def apply(overrides: Overrides, root: Node, mistakes: Mistakes) -> None:
    """Put every override into the tree; one that fits nowhere is a mistake."""
    for path, text, shown in _pairs(overrides, mistakes):
        place = Place(f"--set {shown}", folder=Path.cwd())
        try:
            value = parse(text, place, mistakes)
            node, keys = _start(path.split("."), root)
            _set(node, keys, value, path)
        except Unreadable:
            continue
        except QcError as error:
            mistakes.add(place, error.what, error.fix)


def _pairs(overrides: Overrides, mistakes: Mistakes) -> list[tuple[str, str, str]]:
    """Each override's path, its value as YAML, and how to show it."""
    if isinstance(overrides, Mapping):
        texts = {str(path): json.dumps(value, default=str, ensure_ascii=False) for path, value in overrides.items()}
        return [(path, text, f"{path}={text}") for path, text in texts.items()]
    pairs = []
    for one in [overrides] if isinstance(overrides, str) else overrides:
        path, equals, text = one.partition("=")
        if equals and path.strip():
            pairs.append((path.strip(), text, one))
        else:
            mistakes.add(Place(f"--set {one}"), f"{one!r} sets nothing", "write --set train.steps=100")
    return pairs


def _start(keys: list[str], root: Node) -> tuple[Node, list[str]]:
    """The part of the recipe that the first key means, and the keys from there on."""
    first, rest = keys[0], keys[1:]
    if first in ("extends", "include"):
        raise QcError(f"{first} cannot be set", fix="write a recipe that extends both, and use that")
    if first in KEYS:
        return root, keys
    stages = [one for one in workers(root) if one is not root and "name" in one.map]
    stage = next((one for one in stages if one.map["name"].value == first), None)
    if stage is None:
        return _step(keys, list(workers(root)), [*KEYS, *(str(one.map["name"].value) for one in stages)])
    if not rest:
        raise QcError(f"{first!r} is a stage", fix=f"set a key of it: {first}.train.steps")
    return (stage, rest) if rest[0] in WORK_KEYS else _step(rest, [stage], WORK_KEYS)


def _step(keys: list[str], works: Sequence[Node], others: Sequence[str]) -> tuple[Node, list[str]]:
    """The options of the step that the first key names, and the keys from there on."""
    first, rest = keys[0], keys[1:]
    steps = [step for work in works if "passes" in work.map for step in work.map["passes"].list if _kind(step)]
    kinds = [_kind(step) for step in steps]
    labels = [
        str(step.map["name"].value) if "name" in step.map else f"{kind}-{kinds[: i + 1].count(kind)}"
        for i, (step, kind) in enumerate(zip(steps, kinds, strict=True))
    ]
    found = [i for i, label in enumerate(labels) if label == first and "name" in steps[i].map]
    found = found or [i for i in range(len(steps)) if first in (kinds[i], labels[i])]
    if not found:
        known = [label if "name" in step.map else kind for label, step, kind in zip(labels, steps, kinds, strict=True)]
        near = nearest(first, [*known, *others])
        fix = (
            f"did you mean {near!r}?" if near else f"the steps are {', '.join(known) or 'none'}; or {', '.join(others)}"
        )
        raise QcError(f"the recipe has no {first!r}", fix=fix)
    if len(found) > 1:
        told = " or ".join(labels[i] for i in found)
        raise QcError(f"{first!r} is {len(found)} steps", fix=f"say {told}")
    if not rest:
        raise QcError(f"{first!r} is a step", fix=f"set an option of it: {first}.OPTION=VALUE")
    step, kind = steps[found[0]], kinds[found[0]]
    return (step, rest) if rest[0] in BESIDE and rest[0] not in step.map[kind].map else (step.map[kind], rest)


def _kind(step: Node) -> str:
    kinds = [key for key in step.map if key not in BESIDE]
    return kinds[0] if len(kinds) == 1 else ""


def _set(node: Node, keys: Sequence[str], value: Node, path: str) -> None:
    """Put ``value`` at the end of ``keys``; maps on the way are made, nothing else."""
    parent = ""
    for i, key in enumerate(keys):
        last = i == len(keys) - 1
        if isinstance(node.value, list):
            if not (key.isdigit() and int(key) < len(node.value)):
                raise QcError(f"{parent} has no item {key!r}", fix=f"count from 0 to {len(node.value) - 1}")
            if last:
                node.value[int(key)] = value
            node = node.value[int(key)]
        elif isinstance(node.value, dict) or node.value is None:
            node.value = entries = node.map
            if last:
                entries[key] = value
            elif key not in entries and parent in OPEN:
                near = nearest(key, entries)
                fix = f"did you mean {near!r}?" if near else f"{parent} has {', '.join(entries) or 'none'}"
                raise QcError(f"{parent} has no {key!r}", fix=fix)
            node = entries.setdefault(key, Node({}, value.place, value.place))
        else:
            before = path.partition(f".{key}")[0]
            raise QcError(f"{parent} is {said(node.value)}, which has no {key!r}", fix=f"set {before}=")
        parent = key
