"""Folders laid out as WikiText is: a file each for train, valid and test, with one article after the other in it.

An article begins at a heading of the first level, ``= Title =`` on a line of its own; deeper ones have more signs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from graph.errors import QcError

PARTS = ("train", "valid", "test")
NAME = re.compile(r"(?:wiki\.)?(train|valid|test)\.(?:tokens|raw|txt)")
HEADING = re.compile(r"^ ?= [^=\n](?:[^\n]*[^=\n])? = ?$", re.MULTILINE)


def files(folder: Path) -> dict[str, Path]:
    """The file of each part that is there; without one for train the folder is no such one."""
    if not folder.is_dir():
        raise QcError(f"wikitext: there is no folder {folder}", fix="check the path; it starts at the recipe's folder")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        match = NAME.fullmatch(path.name)
        if match is None or not path.is_file():
            continue
        if match[1] in found:
            what = f"wikitext: {folder} has {found[match[1]].name} and {path.name}, both for {match[1]}"
            raise QcError(what, fix="leave one of them in the folder")
        found[match[1]] = path
    if "train" not in found:
        raise QcError(
            f"wikitext: {folder} has no wiki.train.tokens",
            fix="name a folder with wiki.train.tokens, wiki.train.raw or train.txt, or write {text: GLOB}",
        )
    return {part: found[part] for part in PARTS if part in found}


def articles(text: str) -> Iterator[str]:
    """The articles of a file, each with its heading; what stands before the first is one too."""
    starts = [match.start() for match in HEADING.finditer(text)]
    edges = [0, *(start for start in starts if start), len(text)]
    for begin, end in pairwise(edges):
        if text[begin:end].strip():
            yield text[begin:end]
