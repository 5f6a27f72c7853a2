"""The tables of the reference pages, made from the code. ``python -m tests.docs.reference`` writes them into the pages.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any

from recipes import schema as recipe
from recipes import settings
from runtimes import assess_settings
from runtimes import settings as runtime
from tests.docs.blocks import ROOT

PAGES = ("docs/recipes.md", "docs/passes.md", "docs/models.md", "docs/artifact.md", "docs/interpreter.md")
PLACE = re.compile(r"(<!-- table: (?P<name>[\w.-]+) -->\n).*?(?=<!-- end -->)", re.DOTALL)

SECTIONS = {
    "Selector": "[selector](#selectors)",
    "TensorSelector": "[selector](#selectors), with `group:` as well",
    "Probe": "[probe](#probe)",
    "Train": "[train](#train)",
    "Group": "[group](#groups)",
    "Layerwise": "[layerwise](#layerwise)",
    "Backtrack": "[backtrack](#layerwise)",
    "AutoSnap": "[auto_snap](#auto_snap)",
    "Grokfast": "[grokfast](#grokfast)",
    "Routing": "[routing](#routing)",
    "Divergence": "[divergence](#divergence)",
    "Evaluate": "[evaluate](#evaluate)",
    "Audit": "[audit](#audit)",
    "Assess": "[assess](#assess)",
    "Cache": "[cache](#cache)",
    "Gate": "[gate](#gates)",
    "Export": "[export](#export)",
    "Stage": "[stage](#stages)",
    "Model": "`{model: …}`",
    "LutOptions": "[lut](#lut)",
    "Keep": "[keep](#keep)",
    "GcaGate": "`{function: …, init: …}`",
}
"""What the tables say for a part that has a table of its own."""

SHORT = {
    "data": "[data](#data)",
    "eval_data": "[data](#data)",
    "objective": "[objective](#objectives)",
    "retrieval": "task, or map of tasks to weights",
}
"""Keys whose values have too many forms for a cell."""

REFUSED = ("falcon",)
"""Architectures that cannot be captured; the page says why."""

Schema = Mapping[str, Any]


def schema() -> Schema:
    """The JSON Schema that is shipped; another test keeps it equal to the code."""
    found: Schema = json.loads((ROOT / "recipes/schema.json").read_text(encoding="utf-8"))
    return found


def updated(page: str) -> str:
    """The page with every table as the code has it."""
    text = (ROOT / page).read_text(encoding="utf-8")
    made = PLACE.sub(lambda match: match[1] + table(match["name"]) + "\n", text)
    return made if page == PAGES[0] else re.sub(r"\]\((#selectors|#data)\)", r"](recipes.md\1)", made)


def table(name: str) -> str:
    """The table called ``name``."""
    kind, _, rest = name.partition(".")
    return {"keys": _keys, "pass": _pass, "models": _models, "exit": _exit_codes, "lint": _lint}[kind](rest)


def _lint(_: str) -> str:
    """The rules of ``qc lint``."""
    from runtimes.lint.rules import RULES

    rows = [(rule.id, rule.severity, rule.says, rule.source, rule.advice) for rule in RULES.values()]
    return _table(("rule", "severity", "what is checked", "source", "what to do"), rows)


# -- recipes --------------------------------------------------------------------------------------------------------


def _keys(part: str) -> str:
    """The keys of one part of a recipe."""
    whole = schema()
    properties = whole["properties"] if part == "recipe" else whole["$defs"][part]["properties"]
    hidden = () if part == "recipe" else ("include", "name") if part in ("Kd", "KdCache", "Embedding") else ("include",)
    rows = [_row(key, one, _required(part)) for key, one in properties.items() if key not in hidden]
    return _table(("key", "value", "default", ""), rows)


def _required(part: str) -> list[str]:
    """The keys of a part that have no default; the schema does not ask for all, for a file below may have them."""
    kinds = [getattr(module, part) for module in (runtime, assess_settings, settings, recipe) if hasattr(module, part)]
    return [field.name for kind in kinds for field in fields(kind) if _has_no_default(field)]


def _has_no_default(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _row(key: str, one: Schema, required: Any) -> tuple[str, str, str, str]:
    default = "" if key not in required and one.get("default") in (None, ()) else _default(key, one, required)
    value = "list of passes" if key == "passes" else SHORT.get(key) or _value(one, one.get("default"))
    return f"`{key}`", value, default, " ".join(one.get("description", "").replace("``", "`").split())


def _default(key: str, one: Schema, required: Any) -> str:
    if key in required:
        return "required"
    value = one["default"]
    if isinstance(value, dict):
        value = {k: v for k, v in value.items() if v not in (None, False)}
    return f"`{_yaml(value)}`" if value != {} else "all"


def _yaml(value: Any) -> str:
    """A value as a recipe writes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_yaml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    return json.dumps(value).strip('"')


def _value(one: Schema, default: Any) -> str:
    """What may stand for a key, in words."""
    for key in ("anyOf", "oneOf"):
        if key in one:
            parts = [p for p in one[key] if p.get("type") != "null"]
            said = list(dict.fromkeys(_value(p, None) for p in parts))
            nothing = ["null"] if len(parts) < len(one[key]) and default is not None else []
            return " or ".join(said + nothing)
    if "$ref" in one:
        return SECTIONS[one["$ref"].rpartition("/")[2]]
    if "enum" in one or "const" in one:
        return ", ".join(f"`{v}`" for v in one.get("enum", [one.get("const")]))
    kinds = one["type"] if isinstance(one["type"], list) else [one["type"]]
    return _KINDS[kinds[0]](one)


def _number(word: str) -> Callable[[Schema], str]:
    def said(one: Schema) -> str:
        bounds = {"exclusiveMinimum": "above", "minimum": "from", "exclusiveMaximum": "below", "maximum": "to"}
        limits = [f"{text} {one[key]}" for key, text in bounds.items() if key in one and abs(one[key]) < 1e9]
        return " ".join([word, *limits])

    return said


def _array(one: Schema) -> str:
    if "prefixItems" in one:
        return f"list of {len(one['prefixItems'])} numbers"
    return f"list of {_value(one['items'], None)}"


def _object(one: Schema) -> str:
    inner = one.get("additionalProperties")
    return f"map of names to {_value(inner, None)}" if inner else "map"


_KINDS: Mapping[str, Callable[[Schema], str]] = {
    "integer": _number("whole number"),
    "number": _number("number"),
    "string": lambda one: "text",
    "boolean": lambda one: "`true`, `false`",
    "array": _array,
    "object": _object,
}


# -- passes ---------------------------------------------------------------------------------------------------------


def _pass(name: str) -> str:
    """What the docstring of a pass shows, its contract and its options."""
    from inspect import cleandoc, getmodule

    from passes import registry

    kind = registry.find(name)
    module = getmodule(kind)
    assert module is not None and module.__doc__
    first, *paragraphs = module.__doc__.strip("\n").split("\n\n")
    facts = [
        f"- contract: {_contract(kind.contract)}",
        f"- run a second time, it {'finds nothing to do' if kind.idempotent else 'does more, or refuses'}",
        *([f"- order: {', '.join(f'`{late}`' for late in kind.after)} may not come later"] if kind.after else []),
    ]
    body = [_paragraph(text) for text in [first, *paragraphs]]
    told = " ".join(cleandoc(kind.__doc__ or "").split("\n\n")[0].split())
    return "\n\n".join([told, *body, "\n".join(facts), _keys(kind.__name__)])


def _paragraph(text: str) -> str:
    """Indented text is an example, all other text runs on."""
    lines = text.strip("\n").splitlines()
    if all(line.startswith("    ") for line in lines):
        return "\n".join(["```text", *(line[4:] for line in lines), "```"])
    return " ".join(" ".join(lines).replace("``", "`").split())


def _contract(contract: Any) -> str:
    from passes.base import Close, Lossy

    match contract:
        case Lossy(min_psnr_db=outputs, min_weight_snr_db=weights):
            return f"lossy; outputs keep {outputs:g} dB PSNR, each weight keeps {weights:g} dB SNR"
        case Close(atol=atol, rtol=rtol):
            return f"close; outputs agree within {atol:g} absolute and {rtol:g} relative"
    return {"Exact": "exact; outputs are bit-identical", "TrainingOnly": "training only"}[type(contract).__name__]


# -- models and exit codes ------------------------------------------------------------------------------------------


def _models(which: str) -> str:
    """The architectures of a kind that the tests capture, and their configuration classes."""
    from tests import architectures

    found = {"causal-lm": architectures.CAUSAL, "encoder": architectures.ENCODERS}[which]
    tried = sorted((name, made[0]) for name, made in found.items() if name not in REFUSED)
    return _table(("architecture", "configuration"), [(f"`{name}`", f"`{made}`") for name, made in tried])


def _exit_codes(_: str) -> str:
    from qc import console

    codes = {
        console.OK: "it is done",
        console.USER: "a mistake to fix: the message says what, where and how",
        2: "a wrong call: an unknown command or option",
        console.GATE: "a gate under `require:` does not hold",
        console.VERIFY: "an export does not compute what its graph computes",
        130: "stopped with Ctrl-C; the same command goes on",
    }
    return _table(("code", "meaning"), [(str(code), text) for code, text in codes.items()])


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    def lines() -> Iterator[str]:
        for cells in (head, ("---",) * len(head), *rows):
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join(lines())


if __name__ == "__main__":
    for page in PAGES:
        (ROOT / page).write_text(updated(page), encoding="utf-8")
