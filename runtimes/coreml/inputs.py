"""What the host gives a function beside the hidden states: tokens, positions, rotations, masks.

Each input is made as if every function took it; a function is given those that it declares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from graph.errors import QcError
from runtimes.coreml.meta import ROPE, Mask, Meta

MEMORY_MASK = "memory_mask"

HIDDEN = -10000.0
"""Added to the score of a key that may not be seen: lint rule N9 says why it is no infinity."""


def read_rotations(meta: Meta) -> dict[str, Tensor]:
    """Input -> table of cosines or sines, fp32 [context, size]."""
    if not meta.rotations:
        return {}
    path = meta.folder / ROPE
    if not path.is_file():
        raise QcError(f"{path} is missing", fix="export again")
    try:
        tables = load_file(path)
    except SafetensorError:
        raise QcError(f"{path} is damaged", fix="export again") from None
    missing = next((name for name in meta.rotations if name not in tables), None)
    if missing is not None:
        raise QcError(f"{path} has no table {missing}", fix="export again")
    return {name: tables[name].float() for name in dict.fromkeys(meta.rotations)}


def decoder_inputs(
    meta: Meta, tables: dict[str, Tensor], ids: Sequence[int], position: int, tokens: int
) -> dict[str, Tensor]:
    """The inputs of a block of ``tokens`` whose first real ones are ``ids``, the first of them at ``position``.

    What stands behind the real tokens repeats the last of them, at the positions that follow, and never past the
    context: it is computed and not looked at.
    """
    padded = [*ids, *[ids[-1]] * (tokens - len(ids))]
    positions = torch.arange(position, position + tokens)
    inside = positions.clamp(max=meta.context - 1)
    real = torch.arange(tokens) < len(ids)
    found = {
        "input_ids": torch.tensor([padded], dtype=torch.int32),
        "position_ids": inside.to(torch.int32)[None],
        "position": torch.tensor([position], dtype=torch.int32),
        "onehot": ((torch.arange(meta.context)[:, None] == positions) & real).float()[None, None],
    }
    for name, table in tables.items():
        found[name] = table[inside].mT[None, None]
    for mask in meta.masks:
        found[mask.input] = decoder_mask(meta, mask, position, tokens)
    return found


def memory_inputs(meta: Meta, memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys and values [1, heads, m, size] as functions take them, padded up to M tokens, and the mask that says so.

    Without a memory all of them are zeros, and so is what attention to them gives.
    """
    counts = {tensor.shape[2] for tensor in memory.values()}
    if memory and (set(memory) != set(meta.memory) - {MEMORY_MASK} or len(counts) != 1):
        what = f"the memory is {', '.join(sorted(memory))}"
        raise QcError(what, fix=f"give {', '.join(n for n in meta.memory if n != MEMORY_MASK)}, of as many tokens each")
    found = {name: torch.zeros(shape) for name, shape in meta.memory.items()}
    count = next(iter(counts), 0)
    for name, tensor in memory.items():
        if count > found[name].shape[2]:
            what = f"the memory has {count} tokens, the export takes {found[name].shape[2]}"
            raise QcError(what, fix="give less of it, or export with a larger memory")
        found[name][:, :, :count] = tensor
    if MEMORY_MASK in found:
        found[MEMORY_MASK][..., count:] = HIDDEN
    return found


def decoder_mask(meta: Meta, mask: Mask, position: int, tokens: int) -> Tensor:
    """[1, 1, tokens, keys]: 0 where a query sees a key. In mode ``io`` the block's own keys stand behind the cache."""
    queries = torch.arange(position, position + tokens)[:, None]
    keys = torch.arange(meta.context)[None]
    if meta.cache == "io":
        written = torch.where(keys < position, keys, meta.context + tokens)  # what is not written lies after any query
        keys = torch.cat([written, queries.mT], 1)
    seen = keys <= queries
    if mask.window is not None:
        seen &= keys > queries - mask.window
    return torch.where(seen, 0.0, HIDDEN)[None, None]


def encoder_inputs(meta: Meta, tables: dict[str, Tensor], ids: Sequence[int], length: int) -> dict[str, Tensor]:
    """The inputs of an encoder for one text, padded on the right up to ``length``."""
    padded = [*ids, *[ids[-1]] * (length - len(ids))]
    found = {"input_ids": torch.tensor([padded], dtype=torch.int32)}
    found |= {name: table[:length].mT[None, None] for name, table in tables.items()}
    hidden = torch.where(torch.arange(length) < len(ids), 0.0, HIDDEN)[None, None, None]
    return found | {mask.input: hidden for mask in meta.masks}
