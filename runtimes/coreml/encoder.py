"""An encoder's packages: tokens to hidden states, texts to embeddings."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graph.errors import QcError
from runtimes.coreml.inputs import encoder_inputs, read_rotations
from runtimes.coreml.meta import read_meta
from runtimes.coreml.parts import load_parts, run_part
from runtimes.mil import Trace

_POOLING = Path("1_Pooling/config.json")


class Encoder:
    """The packages of an encoder."""

    def __init__(self, folder: Path, mode: str = "fp32", traces: Mapping[str, Trace] | None = None):
        self.meta = read_meta(folder)
        if self.meta.kind != "encoder":
            raise QcError(f"{folder} is a language model, not an encoder", fix="generate with it")
        self.tables = read_rotations(self.meta)
        self.parts = load_parts(self.meta, mode)
        self.traces = traces
        self.lengths = sorted(self.meta.parts[0].functions.values())

    def hidden(self, ids: Sequence[int]) -> Tensor:
        """The last hidden states [tokens, C] of one text."""
        length = next((n for n in self.lengths if n >= len(ids)), None)
        if length is None:
            what = f"a text has {len(ids)} tokens, the export takes {self.lengths[-1]}"
            raise QcError(what, fix="shorten it, or export with lengths that hold it")
        given = encoder_inputs(self.meta, self.tables, ids, length)
        for loaded in self.parts:
            name = next(name for name, tokens in loaded.part.functions.items() if tokens == length)
            given["hidden"] = run_part(loaded, name, given, traces=self.traces)["hidden_out"]
        return given["hidden"][0, :, 0, : len(ids)].mT

    def pool(self) -> Callable[[Tensor], Tensor]:
        """What makes one embedding [C] of hidden states [tokens, C]."""
        return pooling(self.meta.folder)

    def encode(self, texts: Sequence[str], tokenizer: Any) -> Tensor:
        """Embeddings [texts, C] of length 1, pooled as the model's ``1_Pooling`` says; without it, the mean."""
        pool = self.pool()
        pooled = [pool(self.hidden(list(tokenizer(text)["input_ids"]))) for text in texts]
        return torch.nn.functional.normalize(torch.stack(pooled), dim=-1)


_POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "pooling_mode_mean_tokens": lambda hidden: hidden.mean(0),
    "pooling_mode_cls_token": lambda hidden: hidden[0],
    "pooling_mode_max_tokens": lambda hidden: hidden.amax(0),
    "pooling_mode_lasttoken": lambda hidden: hidden[-1],
}


def pools(folder: Path) -> bool:
    """Whether a model says how its hidden states become an embedding."""
    return (folder / _POOLING).is_file()


def pooling(folder: Path) -> Callable[[Tensor], Tensor]:
    """What ``1_Pooling`` of a model's folder asks for; without it, the mean over the tokens."""
    path = folder / _POOLING
    if not pools(folder):
        return _POOLS["pooling_mode_mean_tokens"]
    try:
        chosen = [key for key, on in json.loads(path.read_text()).items() if key.startswith("pooling_mode_") and on]
    except (ValueError, AttributeError):
        raise QcError(f"{path} is damaged", fix="export again") from None
    if len(chosen) != 1 or chosen[0] not in _POOLS:
        what = f"{path} pools by {' and '.join(chosen) or 'nothing'}"
        raise QcError(what, fix=f"use one of {', '.join(_POOLS)}")
    return _POOLS[chosen[0]]
