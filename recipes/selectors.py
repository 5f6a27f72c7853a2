"""What can be wrong with a selector before any model is seen: roles that do not exist, blocks that are no range."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import Any, get_args

from graph.select import ROLES, Selector
from recipes.document import Node
from recipes.kinds import hints, parts
from recipes.mistakes import Mistakes, nearest

BLOCK = re.compile(r"-?[0-9]+|([0-9]+)-([0-9]+)")


def check_selectors(kind: type[Any], node: Node, named: str, mistakes: Mistakes) -> None:
    """``check_selector`` for all options of ``kind`` that are selectors, or maps of them."""
    for name, annotation in hints(kind).items():
        option = node.map.get(name)
        for part in parts(annotation) if option else ():
            inner = [one for arg in get_args(part) for one in parts(arg)]
            if part is Selector and option:
                check_selector(option, f"{named}.{name}", mistakes)
            elif Selector in inner and option:
                for key, one in option.map.items():
                    check_selector(one, f"{named}.{name}.{key}", mistakes)


def check_selector(node: Node, named: str, mistakes: Mistakes) -> None:
    """Tell what is wrong with the roles and blocks of a selector; wrong kinds of values are told elsewhere."""
    for role in _texts(node, "role"):
        text = str(role.value)
        if any(fnmatchcase(known, text) or fnmatchcase(text, known) for known in ROLES):
            continue
        families = sorted({f"{known.partition('.')[0]}.*" for known in ROLES if "." in known})
        near = nearest(text, families if text.endswith("*") else ROLES) or next(
            (known for known in ROLES if known.endswith(f".{text}")), None
        )
        fix = f"did you mean {near!r}?" if near else f"the roles are {', '.join(ROLES)}"
        mistakes.add(role.place, f"{named}: there is no role {text!r}", fix)
    for block in _texts(node, "block"):
        found = BLOCK.fullmatch(str(block.value))
        if not found:
            what = f"{named}: block {block.value!r} is neither a number nor a range"
            mistakes.add(block.place, what, "write 3, -1 (the last) or 0-5")
        elif found[1] and int(found[1]) > int(found[2]):
            what = f"{named}: block range {block.value!r} runs backwards"
            mistakes.add(block.place, what, f"write {found[2]}-{found[1]}")


def _texts(node: Node, key: str) -> list[Node]:
    if key not in node.map:
        return []
    value = node.map[key]
    return [one for one in (value.list or [value]) if isinstance(one.value, str)]
