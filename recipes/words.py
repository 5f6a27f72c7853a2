"""The words in which mistakes are told."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

from pydantic_core import ErrorDetails

from recipes import schema, settings
from runtimes import assess_settings
from runtimes import settings as runtime

NUMBER = "a number"
WHOLE = "a whole number"

KINDS: dict[str, str] = {
    "int_type": WHOLE,
    "int_from_float": WHOLE,
    "float_type": NUMBER,
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "set_type": "a list",
    "dict_type": "a map",
    "dataclass_type": "a map",
    "dataclass_exact_type": "a map",
    "model_type": "a map",
    "none_required": "null",
    "union_tag_not_found": "a map",
}
"""pydantic's errors for a value of the wrong kind, and the right kind."""

UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")
"""pydantic's errors for a key that does not exist."""

BOUNDS: dict[str, tuple[str, str]] = {
    "greater_than": ("more than", "a number above"),
    "greater_than_equal": ("at least", "a number from"),
    "less_than": ("less than", "a number below"),
    "less_than_equal": ("at most", "a number up to"),
}
"""pydantic's errors for a number out of its range: what must hold, and what to write."""

TRUTH = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}

HOMES: dict[str, type[Any]] = {
    "the recipe itself, not indented": schema.Recipe,
    "train": runtime.Train,
    "train.groups.NAME": runtime.Group,
    "evaluate": runtime.Evaluate,
    "audit": assess_settings.Audit,
    "assess": assess_settings.Assess,
    "a gate under require": settings.Gate,
    "an export": settings.Export,
    "cache": runtime.Cache,
}


def said(value: Any) -> str:
    """A value as messages show it."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else f"{value[:57]}...")
    if isinstance(value, (dict, list)):
        return "a map" if isinstance(value, dict) else "a list"
    return str(value)


def as_meant(value: Any, wanted: list[str]) -> str | None:
    """What to write instead, where that is plain to see."""
    if isinstance(value, float) and WHOLE in wanted and value.is_integer() and abs(value) < 1e15:
        return f"write {int(value)}"
    if isinstance(value, str) and "true or false" in wanted and value.lower() in (*TRUTH, "true", "false"):
        return f"write {TRUTH.get(value.lower(), value.lower())}, without quotes"
    if isinstance(value, str) and {NUMBER, WHOLE} & set(wanted):
        plain = value.replace("_", "").replace(",", "")
        pattern = r"[-+]?[0-9]+" if WHOLE in wanted else r"[-+]?[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?"
        return f"write {plain}, without quotes" if re.fullmatch(pattern, plain) else None
    if wanted == ["a list"]:
        return f"write [{value}]" if isinstance(value, (str, int, float)) else "start each item with '- '"
    return None


def choices(error: ErrorDetails) -> list[str]:
    """The values that a literal allows."""
    expected = str((error.get("ctx") or {}).get("expected", ""))
    return [one.strip("'") for one in re.split(r", | or ", expected)]


def elsewhere(key: str) -> str | None:
    """The section that has ``key``, for a key in the wrong one."""
    homes = [home for home, kind in HOMES.items() if key in {field.name for field in fields(kind)} - {"name", "file"}]
    return homes[0] if homes else None
