"""Read a part of a recipe into the dataclass that describes it: no unknown key, no coercion, all mistakes at once."""

from __future__ import annotations

import json
import re
from functools import cache
from types import GenericAlias
from typing import Any, TypeVar, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError

from graph.errors import QcError, QcErrors
from recipes.document import Node
from recipes.limits import loose, strict
from recipes.mistakes import Mistakes
from recipes.report import report

T = TypeVar("T")

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


@cache
def adapter(kind: type[Any]) -> TypeAdapter[Any]:
    """The validator of ``[kind]``; the list around it hands STRICT on to dataclasses that know nothing of pydantic."""
    listed: Any = GenericAlias(list, (strict(kind),))
    return TypeAdapter(listed, config=STRICT)


def read(kind: type[T], node: Node, named: str, mistakes: Mistakes) -> T | None:
    """``node`` as a ``kind``; None if it is not one. ``named`` is what messages call it."""
    try:
        return cast(T, loose(_validate(kind, node)))
    except ValidationError as error:
        errors = error.errors(include_url=False)
        report(errors, strict(kind), node, named, mistakes)
        wrong = {detail["loc"][1] for detail in errors if len(detail["loc"]) > 1}
        if node.map and wrong & set(node.map):
            _read_rest(kind, node, wrong, named, mistakes)
    except QcError as error:
        _refused(error, node, named, mistakes)
    return None


def _validate(kind: type[Any], node: Node) -> Any:
    return adapter(kind).validate_json(json.dumps([node.plain()]))[0]  # type: ignore[arg-type]


def _read_rest(kind: type[Any], node: Node, wrong: set[str | int], named: str, mistakes: Mistakes) -> None:
    """Hear what ``__post_init__`` says of the entries that are right so far."""
    rest = Node({key: value for key, value in node.map.items() if key not in wrong}, node.place, node.key)
    try:
        _validate(kind, rest)
    except ValidationError:
        return
    except QcError as error:
        _refused(error, rest, named, mistakes)


def _refused(error: QcError, node: Node, named: str, mistakes: Mistakes) -> None:
    """Errors of the dataclass itself, or of one in it, each told at the first key it speaks of."""
    below = {key: one for child in node.map.values() for key, one in child.map.items()} | node.map
    for one in error.errors if isinstance(error, QcErrors) else (error,):
        words = re.findall(r"[\w-]+", f"{one.what} {one.fix}")
        place = next((below[word].place for word in words if word in below), node.place)
        mistakes.add(place, f"{named}: {one.what}", one.fix)
