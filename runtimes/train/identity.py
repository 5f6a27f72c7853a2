"""What a training is: if any of it changes, a checkpoint belongs to another training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from graph import Graph
from graph.hashes import tensor_sha256
from runtimes.settings import Train
from runtimes.train.groups import Members

_FREE_TO_CHANGE = (
    "data",
    "eval_data",
    "batch",
    "lr",
    "checkpointing",
    "memory",
    "eval_every",
    "eval_batches",
    "save_every",
    "keep",
    "trackers",
    "plot",
    "seed",
)
"""Settings that may differ when a training goes on, or that its identity has in another form."""


def identity(settings: Train, groups: Sequence[Members], **facts: Any) -> dict[str, Any]:
    """The settings that decide the result, as plain values, and ``facts`` instead of those left out."""
    kept = {key: value for key, value in asdict(settings).items() if key not in _FREE_TO_CHANGE}
    kept["objective"].pop("cache", None)  # where it lies does not matter; what is in it is among the facts
    kept["groups"] = {member.name: asdict(member.group) for member in groups}
    plain: dict[str, Any] = json.loads(json.dumps(kept | facts, default=str, sort_keys=True))
    return plain


def digest(graph: Graph, names: Iterable[str]) -> str:
    """The sha256 of the tensors ``names`` as they are now."""
    said = [(name, list(graph.shape(name)), tensor_sha256(graph.tensor(name))) for name in sorted(names)]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()
