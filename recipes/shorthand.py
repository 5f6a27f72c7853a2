"""Short forms written out: ``data: python-stdlib``, ``objective: kd``, a pass by its name alone."""

from __future__ import annotations

from collections.abc import Iterator

from recipes.document import Node
from recipes.limits import OBJECTIVES, SOURCES
from recipes.mistakes import Mistakes, nearest
from recipes.words import said

DATA_FORMS = (
    "write python-stdlib, {text: GLOB}, {texts: [TEXT]}, {jsonl: GLOB}, {wikitext: FOLDER}, {hf: NAME} or "
    "{retrieval: TASK}"
)
NAMED_SOURCES = ("python-stdlib",)
DATA = (
    ("train", "data"), ("train", "eval_data"), ("evaluate", "data"), ("audit", "data"), ("assess", "data"),
    ("cache", "data"),
)  # fmt: skip
"""Sections, and their keys that describe data."""


def workers(root: Node) -> Iterator[Node]:
    """The parts of a recipe that can have passes, train and so on: the whole, and each stage."""
    yield root
    if "stages" in root.map:
        yield from (stage for stage in root.map["stages"].list if stage.map)


def data_nodes(root: Node) -> Iterator[tuple[str, Node]]:
    """Every description of data, and what to call it."""
    for work in workers(root):
        for section, key in DATA:
            if section in work.map and key in work.map[section].map:
                yield f"{section}.{key}", work.map[section].map[key]


def write_out(root: Node, mistakes: Mistakes) -> None:
    """Bring all short forms of ``root`` into their long form; what is long already stays."""
    for named, node in data_nodes(root):
        if node.value is not None and not node.bad:
            write_out_data(node, named, mistakes)
    for work in workers(root):
        if "train" in work.map and "objective" in work.map["train"].map:
            _objective(work.map["train"].map["objective"], mistakes)
    write_out_steps(root)


def write_out_data(node: Node, named: str, mistakes: Mistakes) -> None:
    """``python-stdlib`` as ``{source: python-stdlib}``; tell what is no source of data."""
    keys = list(node.map)
    if any(key in SOURCES for key in keys):
        return
    if isinstance(node.value, str) and node.value in NAMED_SOURCES:
        node.value = {"source": Node(node.value, node.place, node.key)}
        return
    fix = DATA_FORMS
    if isinstance(node.value, str):
        name = nearest(node.value, NAMED_SOURCES)
        if name:
            fix = f"did you mean {name!r}?"
        elif any(mark in node.value for mark in "*./"):
            form = "jsonl" if node.value.endswith(".jsonl") else "text"
            fix = f"write {{{form}: {node.value!r}}}"
    near = [found for key in keys if (found := nearest(key, SOURCES))]
    if near:
        fix = f"did you mean {near[0]!r}?"
    what = f"has no source ({', '.join(keys)})" if node.map else f"cannot be {said(node.value)}"
    mistakes.add(node.map[keys[0]].key if keys else node.place, f"{named} {what}", fix)
    node.bad, node.value = True, None


def _objective(node: Node, mistakes: Mistakes) -> None:
    if node.value is None or "name" in node.map:
        name, options = node.map.get("name", node), None
    elif len(node.map) == 1:
        (called, options) = next(iter(node.map.items()))
        name = Node(called, options.key, options.key)
    else:
        name, options = Node(node.value, node.place, node.key), None
    if not isinstance(name.value, str) or name.value not in OBJECTIVES:
        near = nearest(str(name.value), OBJECTIVES) if isinstance(name.value, str) else None
        fix = f"did you mean {near!r}?" if near else f"write {', '.join(OBJECTIVES)}, or {{kd: {{temperature: 2.0}}}}"
        mistakes.add(name.place, f"train.objective cannot be {said(name.value)}", fix)
        node.bad, node.value = True, {"name": Node("causal-lm", node.place, node.key)}
    elif "name" not in node.map:
        if options is not None and options.value is not None and not options.map:
            what = f"train.objective.{name.value} needs a map of options, not {said(options.value)}"
            mistakes.add(options.place, what, f"write objective: {name.value}, or {name.value}: {{…}}")
        node.value = {"name": name, **(options.map if options else {})}


def write_out_steps(root: Node) -> None:
    """``- snap`` as ``- snap:``."""
    for work in workers(root):
        for step in work.map["passes"].list if "passes" in work.map else ():
            if isinstance(step.value, str):
                step.value = {step.value: Node(None, step.place, step.place)}
