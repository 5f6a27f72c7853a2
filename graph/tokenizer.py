"""The files of a tokenizer, which go along with a model and come back through transformers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from graph.errors import QcError

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json",
    "generation_config.json",
)  # fmt: skip


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer lies in ``folder``."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES[:-1])


def load_tokenizer(folder: Path | None, whose: str) -> Any:
    """The transformers tokenizer in ``folder``."""
    from transformers import AutoTokenizer

    if folder is None or not has_tokenizer(folder):
        raise QcError(
            f"{whose} has no tokenizer", fix="put tokenizer.json beside the model's config.json and compile again"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise QcError(f"the tokenizer in {folder} cannot be read: {first[:200]}", fix="repair tokenizer.json") from None


def copy_tokenizer(source: Path, target: Path) -> None:
    """Carry tokenizer, chat template and generation settings over."""
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    if names:
        target.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(source / name, target / name)
