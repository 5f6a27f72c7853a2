"""What the page on LUT weights calls the new place of an option is there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import pytest
import typer
from ruamel.yaml import YAML

from qc import cli
from tests.docs import reference
from tests.docs.blocks import ROOT

Schema = Mapping[str, Any]
schema = cache(reference.schema)
CELLS = re.compile(r"^\| (?P<there>.+) \| (?P<here>.+) \|$", re.MULTILINE)
WORDS = re.compile(r"`([^`]+)`")
ELSEWHERE = ("accelerate", "measured.json", "HF_HOME", "HF_TOKEN", "HF_HUB_OFFLINE", "qc.save_adapter")
"""Words of the right column that are neither of a recipe nor of a command."""

THEIRS = ("init_model_v2", "q4a4_r32", "q4_r64", "recover", "sft", "no-think")
"""Words of the scripts that the right column explains."""


def rows() -> list[tuple[str, str]]:
    """Each row of the tables under From scripts."""
    page = (ROOT / "docs/lut.md").read_text(encoding="utf-8").partition("## From scripts\n")[2]
    found = [(row["there"], row["here"]) for row in CELLS.finditer(page)]
    return [row for row in found if row[0] not in ("there", "---")]


@cache
def known() -> set[str]:
    """Every key, every value of those that have a list of values, and what is neither."""
    return {*_names(schema()), *ELSEWHERE, *THEIRS}


def _names(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        yield from node.get("properties", ())
        yield from map(str, node.get("enum", ()))
        yield from [str(node["const"])] if "const" in node else []
        node = list(node.values())
    if isinstance(node, list):
        for one in node:
            yield from _names(one)


# -- paths in a recipe ----------------------------------------------------------------------------------------------


def forms(node: Schema) -> Iterator[Schema]:
    """The alternatives that a schema has, references followed."""
    if "$ref" in node:
        yield from forms(schema()["$defs"][node["$ref"].rpartition("/")[2]])
        return
    yield node
    for key in ("anyOf", "oneOf"):
        for one in node.get(key, ()):
            yield from forms(one)


def below(nodes: list[Schema], key: str) -> list[Schema]:
    """What a key leads to."""
    found = [form["properties"][key] for form in nodes if key in form.get("properties", {})]
    found = found or [form["additionalProperties"] for form in nodes if form.get("additionalProperties")]
    return [form for node in found if isinstance(node, Mapping) for form in forms(node)]


def at(path: str) -> list[Schema]:
    """The schemas of a path; it begins at the top of a recipe, or with a pass."""
    first, *rest = path.split(".")
    top: list[Schema] = list(forms(schema()))
    passes = [form for one in forms(schema()["properties"]["passes"]["items"]) for form in forms(one)]
    nodes = below(top, first) if first in schema()["properties"] else below(passes, first)
    for key in rest:
        nodes = below(nodes, key)
    return nodes


def takes(nodes: list[Schema], value: Any) -> bool:
    """Whether one of the schemas has room for a value."""
    return any(_takes(node, value) for node in nodes)


def _takes(node: Schema, value: Any) -> bool:
    if "enum" in node or "const" in node:
        return value in node.get("enum", [node.get("const")])
    kinds = {dict: "object", list: "array", bool: "boolean", str: "string", type(None): "null"}
    kind = node.get("type", ())
    if kinds.get(type(value), "number") not in ([kind] if isinstance(kind, str) else kind):
        return False
    if isinstance(value, dict):
        return all(takes(below([node], key), one) for key, one in value.items())
    return not isinstance(value, list) or all(takes(list(forms(node["items"])), one) for one in value)


# -- commands -------------------------------------------------------------------------------------------------------


def options(command: str) -> set[str] | None:
    """The options of ``generate`` or ``cache teacher``; None if there is no such command."""
    found: Any = typer.main.get_command(cli.app)
    for word in command.split():
        found = getattr(found, "commands", {}).get(word)
    if found is None:
        return None
    return {name for option in found.params for name in (*option.opts, *option.secondary_opts)}


def unknown(here: str) -> list[str]:
    """The words of a cell that lead nowhere."""
    lost, offered = list[str](), set[str]()
    for word in WORDS.findall(here):
        if word.startswith("qc "):
            command, dashes, option = word.removeprefix("qc ").partition(" --")
            offered |= options(command) or set()
            good = options(command) is not None and (not dashes or f"--{option}" in offered)
        elif word.startswith("--"):
            good = word in offered
        else:
            good = word in known() or leads(word)
        lost += [] if good else [word]
    return lost


def leads(word: str) -> bool:
    """Whether a word is a path in a recipe, with a value that fits if it has one."""
    path, colon, value = word.partition(": ")
    nodes = at(path)
    return bool(nodes) and (not colon or takes(nodes, YAML(typ="safe").load(value)))


@pytest.mark.parametrize(("there", "here"), rows(), ids=[there[:60] for there, _ in rows()])
def test_the_new_place_of_an_option_is_there(there: str, here: str) -> None:
    assert unknown(here) == []


@pytest.mark.parametrize(
    "word", ["train.stepz", "snaps", "train.clip: soft", "quantize-base.lut.train: all", "qc generat", "qc eval --bath"]
)
def test_a_place_that_is_not_there_is_noticed(word: str) -> None:
    assert unknown(f"`{word}`") == [word]
