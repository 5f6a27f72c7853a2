"""What an export folder holds, from its ``meta.json``; docs/ane.md describes it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from graph.errors import QcError
from runtimes.export import ABOUT

META = "meta.json"
ROPE = "rope.safetensors"


@dataclass(frozen=True)
class Part:
    """One package."""

    file: str
    role: Literal["embed", "chunk", "head", "encoder"]
    functions: dict[str, int]
    """Name -> the tokens it takes."""

    cache: tuple[int, ...] | None
    """[2L, heads, context, size] of its blocks' keys and values."""


@dataclass(frozen=True)
class Mask:
    """An input that hides keys."""

    input: str
    window: int | None
    """How many tokens back a query sees; None: all."""


@dataclass(frozen=True)
class Meta:
    """The contract of an export."""

    folder: Path
    kind: Literal["causal-lm", "encoder"]
    parts: tuple[Part, ...]
    masks: tuple[Mask, ...]
    vocabulary: int
    rotations: tuple[str, ...]
    """The names of the tables of cosines and sines, which are those of their inputs."""

    context: int
    """Tokens that the cache holds; of an encoder 0."""

    prefill: int
    """Tokens of a block of a prompt; 0 where there is no such function."""

    cache: Literal["state_slice", "state_blend", "io"]
    eos: tuple[int, ...]
    """The tokens that end a text, by the model's configuration; there may be more in generation_config.json."""

    profile: dict[str, Any]
    memory: dict[str, tuple[int, ...]]
    """Inputs that bring a memory -> their shapes: keys and values [1, heads, tokens, size], and the mask."""


def is_export(folder: Path) -> bool:
    """Whether a folder is an export for the Neural Engine."""
    return (folder / META).is_file() and (folder / ABOUT).is_file()


def read_meta(folder: Path) -> Meta:
    """Read and check ``meta.json``."""
    path = folder / META
    if not path.is_file():
        raise QcError(
            f"{folder} is no export for the Neural Engine: it has no {META}",
            fix="give the folder that qc export --target ane wrote",
        )
    try:
        data: dict[str, Any] = json.loads(path.read_text())
        if data["format"] != "qc-ane" or data["version"] != 1 or data["kind"] not in ("causal-lm", "encoder"):
            raise KeyError("format")
        meta = _meta(folder, data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise QcError(f"{path} is damaged", fix="export again") from None
    roles = [part.role for part in meta.parts]
    if meta.kind == "causal-lm" and (roles[:1] != ["embed"] or roles[-1] != "head" or "chunk" not in roles[1:-1]):
        raise QcError(f"{path} names no embeddings, chunks and head", fix="export again")
    for part in meta.parts:
        if not (folder / part.file).is_dir():
            raise QcError(f"{folder / part.file} is missing", fix="export again")
    return meta


def _meta(folder: Path, data: dict[str, Any]) -> Meta:
    decoder = data["kind"] == "causal-lm"
    if decoder and data["kv"] not in ("state_slice", "state_blend", "io"):
        raise KeyError("kv")
    return Meta(
        folder=folder,
        kind=data["kind"],
        parts=tuple(_part(part) for part in data["parts"]),
        masks=tuple(Mask(str(mask["input"]), mask["window"]) for mask in data["masks"]),
        vocabulary=int(data["vocab"]),
        rotations=tuple(str(table[key]) for table in data["rope"] for key in ("cos", "sin")),
        context=int(data["context"]) if decoder else 0,
        prefill=int(data["prefill"] or 0) if decoder else 0,
        cache=data["kv"] if decoder else "io",
        eos=tuple(int(token) for token in data.get("eos", ())),
        profile=dict(data["profile"]),
        memory={str(name): tuple(int(n) for n in shape) for name, shape in data.get("memory", {}).items()},
    )


def _part(data: dict[str, Any]) -> Part:
    if data["role"] not in ("embed", "chunk", "head", "encoder") or Path(data["file"]).name != data["file"]:
        raise KeyError("role")
    functions = {str(name): int(about["tokens"]) for name, about in data["functions"].items()}
    cache = tuple(int(n) for n in data["cache"]["shape"]) if data.get("cache") else None
    return Part(data["file"], data["role"], functions, cache)
