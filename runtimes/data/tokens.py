"""Documents as tokens, written once and mapped into memory, so that a large corpus does not sit in RAM."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from graph.errors import QcError
from runtimes.data.chat import Part, parts
from runtimes.data.disk import explained, new_folder
from runtimes.data.sources import Document

Ids: TypeAlias = NDArray[np.integer[Any]]
FORMAT = 1
_AT_ONCE = 256


@dataclass(frozen=True)
class Tokens:
    """All documents of a split, one behind the other."""

    ids: Ids
    """[tokens]"""

    trained: NDArray[np.bool_] | None
    """[tokens], whether each is trained on; None if all are."""

    starts: NDArray[np.int64]
    """[documents + 1], where each begins, and the end of the last."""

    key: str
    """The sha256 of what they were made from."""


def tokenized(documents: Iterable[Document], digests: Iterable[bytes], tokenizer: Any, cache: Path) -> Tokens:
    """The tokens of ``documents``, from ``cache`` if they were made before.

    ``digests`` are those of the documents, in order: the cache goes by what the documents say, and by the tokenizer.
    """
    if tokenizer is None:
        raise QcError(
            "there is no tokenizer to read text with", fix="put tokenizer.json beside the model's config.json"
        )
    if end_of(tokenizer) is None:
        raise QcError(
            "the tokenizer has no end-of-sequence token, so the model cannot learn to stop",
            fix="set eos_token in tokenizer_config.json",
        )
    key = _key(tokenizer, digests)
    folder = cache / key[:24]
    found = _open(folder, key)
    if found is None:
        with explained("the tokens of the data", cache), new_folder(folder) as temporary:
            _write(temporary, documents, tokenizer, key)
        found = _open(folder, key)
    assert found is not None, "what was just written can be read"
    return found


def _key(tokenizer: Any, digests: Iterable[bytes]) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    settings = [
        FORMAT,
        type(tokenizer).__name__,
        model,
        getattr(tokenizer, "chat_template", None),
        end_of(tokenizer),
        _opening(tokenizer),
    ]
    whole = hashlib.sha256(json.dumps(settings).encode())
    for digest in digests:
        whole.update(digest)
    return whole.hexdigest()


def _open(folder: Path, key: str) -> Tokens | None:
    """What ``folder`` holds, or None where it is absent, half there or of something else."""
    try:
        about = json.loads((folder / "about.json").read_text())
        count, documents, dtype = about["tokens"], about["documents"], np.dtype(about["dtype"])
        sizes = {"ids.bin": count * dtype.itemsize, "starts.bin": 8 * (documents + 1)} | (
            {"trained.bin": count} if about["prompts"] else {}
        )
        if about["key"] != key or any((folder / name).stat().st_size != size for name, size in sizes.items()):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if count == 0:
        return Tokens(np.zeros(0, dtype), None, np.zeros(1, np.int64), key)
    ids = np.memmap(folder / "ids.bin", dtype, "r", shape=(count,))
    starts = np.memmap(folder / "starts.bin", np.int64, "r", shape=(documents + 1,))
    trained = np.memmap(folder / "trained.bin", np.bool_, "r", shape=(count,)) if about["prompts"] else None
    return Tokens(ids, trained, starts, key)


def _write(folder: Path, documents: Iterable[Document], tokenizer: Any, key: str) -> None:
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    starts, count, prompts = [0], 0, False
    with open(folder / "ids.bin", "wb") as ids_file, open(folder / "trained.bin", "wb") as trained_file:
        for ids, trained, has_prompt in _encoded(documents, tokenizer):
            ids_file.write(np.asarray(ids, dtype).tobytes())
            trained_file.write(np.asarray(trained, np.bool_).tobytes())
            count += len(ids)
            starts.append(count)
            prompts = prompts or has_prompt
    (folder / "starts.bin").write_bytes(np.asarray(starts, np.int64).tobytes())
    if not prompts:
        (folder / "trained.bin").unlink()
    about = {"key": key, "tokens": count, "documents": len(starts) - 1, "dtype": dtype.name, "prompts": prompts}
    (folder / "about.json").write_text(json.dumps(about))


def _encoded(documents: Iterable[Document], tokenizer: Any) -> Iterator[tuple[list[int], list[bool], bool]]:
    """Ids, what of them is trained on, and whether the rest is a prompt; many documents are encoded in one call."""
    waiting, opening = iter(documents), _opening(tokenizer)
    while batch := list(islice(waiting, _AT_ONCE)):
        pieces: list[tuple[Document, list[Part]]] = [(d, p) for d in batch for p in parts(d, tokenizer)]
        texts = [text for _, part in pieces for text, _ in part]
        encoded = (
            iter(tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"])
            if texts
            else iter(())
        )
        for document, part in pieces:
            plain = document.prompt is None and document.messages is None
            ids = list(opening) if document.messages is None else []
            trained = [plain] * len(ids)
            for _, learned in part:
                new = next(encoded)
                ids += new
                trained += [learned] * len(new)
            _close(ids, trained, end_of(tokenizer), chat=document.messages is not None)
            yield ids, trained, not plain


def _close(ids: list[int], trained: list[bool], eos: int, chat: bool) -> None:
    """End the document with a learned end-of-sequence token; what a template writes behind one is not learned."""
    if chat:
        seen = False
        for at in range(len(ids) - 1, -1, -1):
            seen = trained[at] and (seen or ids[at] == eos)
            if trained[at] and not seen and _ends_later(ids, trained, at, eos):
                trained[at] = False
    last = next((at for at in range(len(ids) - 1, -1, -1) if trained[at]), -1)
    if last < 0 or ids[last] != eos:
        ids.append(eos)
        trained.append(True)


def _ends_later(ids: list[int], trained: list[bool], at: int, eos: int) -> bool:
    """Whether the answer that token ``at`` belongs to has an end-of-sequence token before it."""
    while at >= 0 and trained[at]:
        if ids[at] == eos:
            return True
        at -= 1
    return False


def end_of(tokenizer: Any) -> Any:
    """The token that ends a text: of encoders, which have no end of a sequence, the separator."""
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else getattr(tokenizer, "sep_token_id", None)


def _opening(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text of its own accord: a beginning-of-sequence token, or nothing."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    return list(full[:at])
