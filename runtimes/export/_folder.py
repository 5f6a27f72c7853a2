"""The folder of an export: what may stand in its way, what is copied into it, and how it appears whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graph import QcError
from graph.artifact import appearing
from graph.hashes import recorded
from graph.tokenizer import TOKENIZER_FILES, copy_tokenizer
from runtimes.export import ABOUT

_EMBEDDER = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json")
"""What sentence-transformers reads beside the model."""


def in_the_way(out: Path, source: Path | None, tokenizer: Path | None, force: bool) -> list[QcError]:
    """What of the given folders is missing, and whether ``out`` is taken."""
    errors = []
    for folder, what in ((source, "model folder"), (tokenizer, "tokenizer folder")):
        if folder is not None and not folder.is_dir():
            errors.append(QcError(f"there is no {what} {folder}", fix="check the path"))
        elif folder is tokenizer is not None and not any((tokenizer / name).is_file() for name in TOKENIZER_FILES):
            errors.append(QcError(f"{tokenizer} has no tokenizer", fix="give the folder that holds tokenizer.json"))
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not force)):
        fix = "give another folder, or remove it first: nothing is overwritten"
        errors.append(QcError(f"{out} is already there", fix=fix))
    return errors


@contextmanager
def replacing(out: Path, force: bool) -> Iterator[Path]:
    """A new folder that takes the place of ``out`` when it is whole."""
    if not (force and out.is_dir() and any(out.iterdir())):
        with appearing(out) as new:
            yield new
        return
    fresh, old = (out.with_name(f".{out.name}.{word}-{os.getpid()}") for word in ("new", "old"))
    with appearing(fresh) as new:
        yield new
    os.replace(out, old)
    os.replace(fresh, out)
    shutil.rmtree(old)


def carry(folder: Path, new: Path) -> None:
    """Copy the tokenizer of a model, and what sentence-transformers reads beside it."""
    copy_tokenizer(folder, new)
    for name in _EMBEDDER:
        if (folder / name).is_file():
            (new / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, new / name)


def sign(new: Path, head: Mapping[str, Any], known: Mapping[str, str] | None = None) -> None:
    """Write what the export is, and the BLAKE3 hash of each of its files, of those ``known`` as they were written."""
    told = known or {}
    files = {str(p.relative_to(new)): p for p in sorted(new.rglob("*")) if p.is_file()}
    write_json(new / ABOUT, {**head, "files": {name: recorded(p, told.get(name)) for name, p in files.items()}})


def sizes_of(out: Path) -> dict[str, int]:
    """The bytes of each file."""
    return {p.relative_to(out).as_posix(): p.stat().st_size for p in sorted(out.rglob("*")) if p.is_file()}


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Plain data, sorted, as text."""
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")
