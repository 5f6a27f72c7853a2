"""Which keys a dataclass knows, at any depth, and what they say of themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

from graph.select import Selector
from recipes.docs import field_docs


def hints(kind: type[Any]) -> dict[str, Any]:
    """The types of the fields of a dataclass."""
    types = get_type_hints(kind, localns={"Selector": Selector}, include_extras=True)
    return {field.name: types[field.name] for field in fields(kind)}


def fields_at(kind: type[Any], keys: Sequence[str | int], labels: Sequence[str | int] = ()) -> list[str]:
    """The field names of what lies below ``keys``; of several dataclasses those that a label names."""
    types: list[Any] = [kind]
    for key in keys:
        types = [inner for one in types for inner in _below(one, key)]
    found = list(
        dict.fromkeys(part for one in types for part in parts(one) if isinstance(part, type) and is_dataclass(part))
    )
    named = [one for one in found if getattr(one, "__name__", None) in labels] or found
    return list(dict.fromkeys(name for one in named for name in hints(one)))


def parts(annotation: Any) -> Iterator[Any]:
    """The alternatives of a type: ``A | B | None`` -> A, B, NoneType; ``Annotated[A, ...]`` -> A."""
    if hasattr(annotation, "__metadata__"):
        yield from parts(annotation.__origin__)
    elif get_args(annotation) and getattr(annotation, "__origin__", None) not in (dict, Mapping, tuple, list):
        for one in get_args(annotation):
            yield from parts(one)
    else:
        yield annotation


def _below(annotation: Any, key: str | int) -> Iterator[Any]:
    """The types of what a value of this type holds under ``key``."""
    for one in parts(annotation):
        if is_dataclass(one) and isinstance(one, type):
            yield from [hints(one)[key]] if key in hints(one) else []
        elif get_args(one):
            yield get_args(one)[-1] if issubclass(one.__origin__, Mapping) else get_args(one)[0]


def doc_at(kind: type[Any], keys: Sequence[str | int]) -> str:
    """What the field at ``keys`` says of itself, as part of a sentence."""
    names = [key for key in keys if isinstance(key, str)]
    types: list[Any] = [kind]
    doc = ""
    for key in names:
        kinds = [one for part in types for one in parts(part) if isinstance(one, type)]
        docs = [field_docs(one)[key] for one in kinds if key in field_docs(one)]
        doc = docs[0] if docs else doc
        types = [inner for one in types for inner in _below(one, key)]
    return f"{doc[:1].lower()}{doc[1:]}".replace("``", "").rstrip(".")
