"""A decoder's packages: prompts in blocks, then one token at a time, over the cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from graph.errors import QcError
from runtimes.coreml.inputs import decoder_inputs, memory_inputs, read_rotations
from runtimes.coreml.meta import read_meta
from runtimes.coreml.parts import Loaded, load_parts, run_part
from runtimes.mil import State, Trace


class Decoder:
    """The packages of a decoder, ready to read tokens; what it remembers of a text is a ``Session``.

    It is what ``runtimes.generate.Generator`` takes in the place of a graph.
    """

    uncached: str | None = None
    device = torch.device("cpu")

    def __init__(self, folder: Path, mode: str = "fp32", traces: Mapping[str, Trace] | None = None):
        self.meta = read_meta(folder)
        if self.meta.kind != "causal-lm":
            raise QcError(f"{folder} is an encoder, which generates no text", fix="give the export of a language model")
        self.tables = read_rotations(self.meta)
        self.parts = load_parts(self.meta, mode)
        self.traces = traces
        self.vocabulary = self.meta.vocabulary

    @property
    def limit(self) -> int:
        """The most positions."""
        return self.meta.context

    def reader(self, prompts: list[list[int]], slots: int, padding: int) -> Rows:
        """Reads prompts for a generator; each row has a cache of its own, so there is no padding."""
        return Rows([Session(self) for _ in prompts], prompts)


class Rows:
    """Some texts, each read with its own cache."""

    def __init__(self, sessions: list[Session], prompts: list[list[int]]):
        self.sessions, self.prompts = sessions, prompts

    def start(self) -> Tensor:
        """The logits [B, V] behind the prompts."""
        return torch.stack([s.read(ids) for s, ids in zip(self.sessions, self.prompts, strict=True)])

    def next(self, tokens: Tensor) -> Tensor:
        """The logits [B, V] behind one more token [B]."""
        return torch.stack([s.read([token]) for s, token in zip(self.sessions, tokens.tolist(), strict=True)])


class Session:
    """One text as a decoder has read it so far, beside the keys and values of a memory if there is one."""

    def __init__(self, decoder: Decoder, memory: Mapping[str, Tensor] | None = None):
        self.decoder, self.position = decoder, 0
        self.memory = memory_inputs(decoder.meta, memory or {})
        self.states: list[State] = [loaded.package.state() for loaded in decoder.parts]
        self.caches: list[Tensor | None] = [self._empty(loaded) for loaded in decoder.parts]

    def _empty(self, loaded: Loaded) -> Tensor | None:
        given = self.decoder.meta.cache == "io" and loaded.part.cache is not None
        return torch.zeros(loaded.part.cache) if given and loaded.part.cache else None

    def read(self, ids: Sequence[int]) -> Tensor:
        """The logits [V] behind more tokens."""
        hidden = torch.empty(0)
        for block, name, tokens in self._blocks(ids):
            hidden = self._hidden(block, name, tokens)
        return self._logits(hidden)

    def read_all(self, ids: Sequence[int]) -> Tensor:
        """The logits [tokens, V] behind each of more tokens."""
        found = []
        for block, name, tokens in self._blocks(ids):
            hidden = self._hidden(block, name, tokens, every=True)
            found += [self._logits(hidden[..., i : i + 1]) for i in range(len(block))]
        return torch.stack(found)

    def _blocks(self, ids: Sequence[int]) -> Iterator[tuple[Sequence[int], str, int]]:
        """Tokens cut into blocks of prefill, the last of which may be filled up; and single ones."""
        context, size = self.decoder.meta.context, self.decoder.meta.prefill
        if self.position + len(ids) > context:
            what = f"{self.position} tokens and {len(ids)} more exceed the {context} of the export's context"
            raise QcError(what, fix="read less, or export with a larger --context")
        at = 0
        while at < len(ids):
            left = len(ids) - at
            if size and left > 1 and self.position + size <= context:
                block, name, tokens = ids[at : at + size], "prefill", size
            else:
                block, name, tokens = ids[at : at + 1], "infer", 1
            yield block, name, tokens
            self.position += len(block)
            at += len(block)

    def _hidden(self, ids: Sequence[int], name: str, tokens: int, every: bool = False) -> Tensor:
        """The hidden states in front of the head: of the last real token, or of all."""
        decoder = self.decoder
        given = decoder_inputs(decoder.meta, decoder.tables, ids, self.position, tokens) | self.memory
        for number, loaded in enumerate(decoder.parts[:-1]):
            cache = self.caches[number]
            if cache is not None:
                given["kv_cache"] = cache
            results = run_part(loaded, name, given, self.states[number], decoder.traces)
            given["hidden"] = results["hidden_out"]
            if cache is not None:
                end = self.position + len(ids)
                cache[:, :, self.position : end] = results["kv_new"][:, :, : len(ids)]
        real = given["hidden"][..., : len(ids)]
        return real if every else real[..., -1:]

    def _logits(self, hidden: Tensor) -> Tensor:
        """[1, C, 1, 1] -> [V], the pieces of the head one behind the other."""
        head = self.decoder.parts[-1]
        found = run_part(head, "infer", {"hidden": hidden}, traces=self.decoder.traces)
        pieces = [found[f"logits_{i + 1}"].reshape(-1) for i in range(len(found))]
        return torch.cat(pieces)
