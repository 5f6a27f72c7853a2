"""Real documents: functions of Python's standard library, asked for by name, answered by their docstring's first line.

The text differs a little between releases of Python, so these questions are the same wherever the release is.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from graph.errors import QcError
from runtimes import stdlib_text
from runtimes.retrieval.dice import Dice
from runtimes.retrieval.example import Asked, Example, Split, drawn, split_of
from runtimes.settings import Retrieval

QUESTION = "What does {key}() do?"
CATEGORY = "docstrings"

_LONGEST = 100
"""Characters of a signature, and of a first line, above which a function is left out."""


@dataclass(frozen=True)
class Function:
    """What is told of a function."""

    name: str
    module: str
    signature: str
    summary: str
    """The first line of its docstring."""

    def text(self) -> str:
        """Its head, as the source has it."""
        return f'{self.signature}\n    """{self.summary}"""'


def docstrings(data: Retrieval, split: Split, chunks: int, dice: Dice) -> Example:
    """``entries`` functions of other names and other summaries in each chunk."""
    chosen = [dice.choice(functions(split))]
    while len(chosen) < chunks * data.entries:
        chosen.append(_another(chosen, split, data.hard, dice))
    wanted = chosen[: data.asks]
    dice.shuffle(chosen)
    parts = [chosen[at : at + data.entries] for at in range(0, len(chosen), data.entries)]
    asked = (
        Asked(QUESTION.format(key=one.name), one.name, one.summary, chosen.index(one) // data.entries, CATEGORY)
        for one in wanted
    )
    return Example(tuple("\n\n".join(one.text() for one in part) for part in parts), tuple(asked))


def _another(chosen: Sequence[Function], split: Split, hard: float, dice: Dice) -> Function:
    """A function told apart from the ``chosen``; in the share that is hard, of the module of the first."""
    names, said = {one.name for one in chosen}, {one.summary for one in chosen}

    def good(one: Function) -> bool:
        return one.name not in names and one.summary not in said

    beside = [one for one in _modules(split)[chosen[0].module] if good(one)]
    if beside and dice.chance(hard):
        return dice.choice(beside)
    return drawn(dice, lambda dice: dice.choice(functions(split)), good, "functions")


@cache
def functions(split: Split) -> tuple[Function, ...]:
    """Every public function and method of the library proper that has a docstring, by module and place."""
    found = tuple(one for one in _all() if split_of(one.name) == split)
    if not found:
        raise QcError(
            "this Python has no source of its standard library", fix="install it, or ask for lookup or needle"
        )
    return found


@cache
def _modules(split: Split) -> dict[str, list[Function]]:
    found: dict[str, list[Function]] = {}
    for one in functions(split):
        found.setdefault(one.module, []).append(one)
    return found


@cache
def _all() -> tuple[Function, ...]:
    found: list[Function] = []
    for path in stdlib_text.stdlib_files("train") + stdlib_text.stdlib_files("heldout"):
        if not stdlib_text.is_test(path):
            found += _of_module(stdlib_text.read_text(path), str(stdlib_text.relative_path(path)))
    return tuple(found)


def _of_module(source: str, module: str) -> Iterator[Function]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # a few files of the library are templates
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or node.name.startswith("test"):
            continue
        lines = (ast.get_docstring(node) or "").split("\n")
        summary = re.sub(r"\s+", " ", lines[0]).strip()
        signature = f"def {node.name}({ast.unparse(node.args)}):"
        if 12 <= len(summary) <= _LONGEST and len(signature) <= _LONGEST and '"' not in summary:
            yield Function(node.name, module, signature, summary)
