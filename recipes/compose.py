"""``extends:`` and ``include:``: one tree out of several files, every value still at its own place."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from graph.errors import QcError
from recipes import files, shorthand
from recipes.document import Node, Unreadable, parse
from recipes.mistakes import Mistakes, Place
from recipes.words import said

WHOLE_KEYS = ("data", "eval_data", "objective", "select")
"""Keys whose map is one choice: it replaces the base's, it is not merged with it."""

SECTIONS = ("audit", "assess", "train", "evaluate", "probe", "cache")
"""Keys whose map may ``include:`` another file, as may the recipe itself and each stage."""

Chain = tuple[tuple[Path, str, Place | None], ...]


def compose(path: Path, shown: str, mistakes: Mistakes, chain: Chain = ()) -> Node:
    """The tree of a file on top of what it extends and includes.

    Raises Unreadable, or QcError, if it cannot be read. Of the others, those that cannot be read are told and left out.
    """
    start = Place(shown, 1, 1, path.parent)
    root = parse(files.read(path, shown), start, mistakes)
    if not root.map:
        what = f"{shown} is empty" if root.value in (None, {}) else f"a recipe is a map, not {said(root.value)}"
        mistakes.add(root.place, what, "begin with `model:`; `qc recipes copy quickstart` gives an example")
        raise Unreadable
    shorthand.write_out_steps(root)
    chain = (*chain, (_absolute(path), shown, None))
    included = _take(root, "include", mistakes, chain)
    for section in SECTIONS:
        if section in root.map:
            _include(root.map[section], mistakes, chain)
    for stage in root.map["stages"].list if "stages" in root.map else ():
        for part in (stage, *(stage.map[section] for section in SECTIONS if section in stage.map)):
            _include(part, mistakes, chain)
    for base in reversed([*_take(root, "extends", mistakes, chain), *included]):
        root = merge(base, root)
    return root


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))


def _include(node: Node, mistakes: Mistakes, chain: Chain) -> None:
    merged = node
    for base in reversed(_take(node, "include", mistakes, chain)):
        merged = merge(base, merged)
    node.value = merged.value


def _take(node: Node, key: str, mistakes: Mistakes, chain: Chain) -> list[Node]:
    """The trees of the files that ``key`` names; the key is gone afterwards."""
    if key not in node.map:
        return []
    value = node.map.pop(key)
    named = value.list if isinstance(value.value, list) else [value]
    found = [_other(one, key, mistakes, chain) for one in named]
    mistakes.partial |= None in found
    return [one for one in found if one is not None]


def _other(name: Node, key: str, mistakes: Mistakes, chain: Chain) -> Node | None:
    if not isinstance(name.value, str) or not name.value:
        mistakes.add(
            name.place, f"{key} needs the name of a recipe, not {said(name.value)}", "write a path or a list of paths"
        )
        return None
    path, shown = files.find(name.value, name.place.folder)
    *before, (here, called, _) = chain
    links: Chain = (*before, (here, called, name.place))
    known = [link[0] for link in links]
    if _absolute(path) in known:
        cycle = links[known.index(_absolute(path)) :]
        told = ", ".join(f"{place} names {after}" for (_, _, place), after in zip(
            cycle, [*(link[1] for link in cycle[1:]), shown], strict=True))  # fmt: skip
        mistakes.add(name.place, f"{shown} extends itself: {told}", f"take one {key} out")
        return None
    try:
        return compose(path, shown, mistakes, links)
    except Unreadable:
        return None
    except QcError as error:
        at = f"{error.what} ({error.line})" if error.line else error.what
        mistakes.add(name.place, at, error.fix)
        return None


def merge(base: Node, own: Node, key: str = "") -> Node:
    """``own`` on top of ``base``: maps entry by entry, lists of named things by name, all else replaced."""
    if key in WHOLE_KEYS:
        return own
    if isinstance(base.value, dict) and isinstance(own.value, dict):
        both = {name: merge(base.value[name], node, name) for name, node in own.value.items() if name in base.value}
        return Node({**base.value, **own.value, **both}, own.place, own.key, own.bad)
    if key in ("passes", "stages") and isinstance(base.value, list) and isinstance(own.value, list):
        put = _merge_step if key == "passes" else merge
        return Node(_by_name(base.value, own.value, put), own.place, own.key, own.bad)
    return own


def _by_name(base: list[Node], own: list[Node], put: Callable[[Node, Node], Node]) -> list[Node]:
    """An item whose ``name:`` the base has continues that one; only such items: the base's list, changed in places."""
    old = {_name(item): item for item in base}
    merged = [put(old[name], item) if (name := _own_name(item)) and name in old else item for item in own]
    if not own or not all(_own_name(item) in old for item in own):
        return merged
    new = {_own_name(item): item for item in merged}
    return [new.get(_name(item), item) for item in base]


def _merge_step(base: Node, own: Node) -> Node:
    """``own`` with the options of ``base`` below its own; another pass of that name takes its place."""
    kind = _kind(own)
    if kind is None or kind != _kind(base):
        return own
    if own.map[kind].value is None:
        own.map[kind] = base.map[kind]
    return merge(base, own)


def _own_name(item: Node) -> str | None:
    name = item.map["name"].value if "name" in item.map else None
    return name if isinstance(name, str) else None


def _name(item: Node) -> str | None:
    return _own_name(item) or _kind(item)


def _kind(item: Node) -> str | None:
    """The pass that a step names; None for a stage."""
    keys = [key for key in item.map if key not in ("name", "on")]
    return keys[0] if len(keys) == 1 else None
