"""The JSON Schema of recipes, for editors. ``python -m recipes.json_schema`` writes recipes/schema.json again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from graph.select import ROLES
from passes import registry
from recipes.docs import field_docs, summary
from recipes.kinds import hints, parts
from recipes.limits import OBJECTIVES, strict
from recipes.schema import Header, PassStep, Recipe, Stage, Work
from recipes.section import adapter
from recipes.settings import Export, Gate
from recipes.shorthand import NAMED_SOURCES
from runtimes.assess_settings import Assess, Audit
from runtimes.settings import Cache, Evaluate, PythonStdlib, Train

FILE = Path(__file__).parent / "schema.json"
Schema = dict[str, Any]

SECTIONS: dict[str, type[Any]] = {
    "audit": Audit, "assess": Assess, "train": Train, "evaluate": Evaluate, "require": Gate, "export": Export,
}  # fmt: skip
CACHED = "kd-cache"
"""The objective that needs no ``data``: its cache has the text."""

NEEDED = ("Gate", "Export", "Model", "JsonLines", "HubDataset", "TextFiles", "Texts", "Wikitext")
"""Kinds whose required keys the schema asks for; the others can get theirs from a file they extend."""

FILES: Schema = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
INCLUDE: Schema = {**FILES, "description": "Files whose content goes below this one's, relative to this file."}
EXTENDS: Schema = {**FILES, "description": "Recipes below this one: paths relative to this file, or shipped names."}


def json_schema(passes: Sequence[str]) -> Schema:
    """The schema of a recipe that may use ``passes``."""
    kinds = {name: registry.find(name) for name in passes}
    defs: Schema = {}
    for kind in (Header, Cache, *SECTIONS.values(), *kinds.values()):
        _define(kind, defs)
    header = defs.pop("Header")["properties"]
    work = {key: _section(key, kind.__name__, defs) for key, kind in SECTIONS.items()}
    work["passes"] = _described({"type": ["array", "null"], "items": _step(kinds)}, Work, "passes")
    _write_short_forms(defs)
    name = _described({"type": "string"}, Stage, "name")
    start = _described({"type": ["string", "null"]}, Stage, "start")
    defs["Stage"] = _map({"name": name, "start": start, "include": INCLUDE, **work}, summary(Stage), required=["name"])
    stages = _described({"type": ["array", "null"], "items": _ref("Stage")}, Recipe, "stages")
    defs["Cache"]["properties"]["include"] = INCLUDE
    cache = _described({"anyOf": [_ref("Cache"), {"type": "null"}]}, Recipe, "cache")
    top = {**header, **work, "cache": cache, "stages": stages, "extends": EXTENDS, "include": INCLUDE}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "qc recipe",
        **_map(top, summary(Recipe)),
        **_needed_alone(),
        "$defs": dict(sorted(defs.items())),
    }


def _define(kind: Any, defs: Schema) -> None:
    """Add a dataclass, and all it refers to."""
    made = adapter(kind).json_schema(ref_template="#/$defs/{model}")["$defs"]
    for one in _reached(kind):
        schema = made[one.__name__]
        for key, text in field_docs(one).items():
            if key in schema["properties"]:
                schema["properties"][key].setdefault("description", text)
        schema["description"] = summary(one)
        if one.__name__ not in NEEDED:
            schema.pop("required", None)
        if one.__name__ == "Selector":
            schema["properties"]["role"]["examples"] = list(ROLES)
        defs[one.__name__] = _untitled(schema)


def _reached(kind: Any) -> Iterator[Any]:
    """A dataclass and those of its fields."""
    yield kind
    for annotation in hints(strict(kind)).values():
        for one in parts(annotation):
            for inner in [one, *getattr(one, "__args__", ())]:
                if is_dataclass(inner):
                    yield from _reached(inner)


def _section(key: str, name: str, defs: Schema) -> Schema:
    if key in ("require", "export"):
        return _described({"type": ["array", "null"], "items": _ref(name)}, Work, key)
    defs[name]["properties"]["include"] = INCLUDE
    return _described({"anyOf": [_ref(name), {"type": "null"}]}, Work, key)


def _step(kinds: dict[str, Any]) -> Schema:
    """A pass by its name, or a map of its name and its options, with ``name`` and ``on`` beside it."""
    options = {
        name: {"anyOf": [_ref(kind.__name__), {"type": "null"}], "description": summary(kind)}
        for name, kind in kinds.items()
    }
    beside = {key: _described({"type": "string"}, PassStep, key) for key in ("name", "on")}
    one = [{"required": [name]} for name in kinds]
    return {"anyOf": [{"enum": list(kinds)}, {**_map({**options, **beside}, "A pass."), "oneOf": one}]}


def _write_short_forms(defs: Schema) -> None:
    """``data: python-stdlib``, ``objective: kd`` and ``objective: {kd: {...}}``."""
    for kind in OBJECTIVES.values():
        defs[kind.__name__]["required"] = ["name"]
    defs[PythonStdlib.__name__]["required"] = ["source"]
    inner = {
        name: {"anyOf": [_without(defs[kind.__name__], "name"), {"type": "null"}]} for name, kind in OBJECTIVES.items()
    }
    short = {**_map(inner, "An objective and its options."), "minProperties": 1, "maxProperties": 1}
    objective = defs[Train.__name__]["properties"]["objective"]
    long = objective.pop("oneOf")
    objective.pop("default")
    objective["anyOf"] = [{"enum": list(OBJECTIVES)}, short, *long]
    for one in defs.values():
        for key in ("data", "eval_data"):
            if key in one.get("properties", {}):
                data = one["properties"][key]
                kinds = data.pop("oneOf", None) or data["anyOf"]
                data["anyOf"] = [{"enum": list(NAMED_SOURCES)}, *kinds]


def _needed_alone() -> Schema:
    """What a recipe needs that is built on no other."""
    alone = {"not": {"anyOf": [{"required": ["extends"]}, {"required": ["include"]}]}}
    named = {"anyOf": [{"required": [CACHED]}, {"required": ["name"], "properties": {"name": {"const": CACHED}}}]}
    cached = {"anyOf": [{"const": CACHED}, {"type": "object", **named}]}
    with_data = {
        "required": ["steps"],
        "if": {"required": ["objective"], "properties": {"objective": cached}},
        "else": {"required": ["data"]},
    }
    train = {"if": {"type": "object", "not": {"required": ["include"]}}, "then": with_data}
    model = {"anyOf": [{"required": ["model"]}, {"required": ["models"]}]}
    return {"if": alone, "then": {**model, "properties": {"train": train}}}


def _map(properties: Schema, description: str, required: Sequence[str] = ()) -> Schema:
    found = {"type": "object", "description": description, "properties": properties, "additionalProperties": False}
    return {**found, "required": list(required)} if required else found


def _described(schema: Schema, kind: Any, key: str) -> Schema:
    return {"description": field_docs(kind)[key], **schema}


def _without(schema: Schema, key: str) -> Schema:
    properties = {name: one for name, one in schema["properties"].items() if name != key}
    return _map(properties, schema["description"])


def _ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


def _untitled(schema: Any) -> Any:
    """Without the titles that pydantic makes of field names."""
    if isinstance(schema, list):
        return [_untitled(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: _untitled(one) for key, one in schema.items() if not (key == "title" and isinstance(one, str))}


def text() -> str:
    """The content of recipes/schema.json: the passes that come with qc."""
    return json.dumps(json_schema(registry.shipped()), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
