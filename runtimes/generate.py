"""Generate text: from a graph, with a key/value cache wherever it takes one, or from whatever else reads tokens."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from graph import Graph, QcError
from runtimes.detokenize import StopFinder, TextStream
from runtimes.reading import GraphModel, Model
from runtimes.sampling import Chooser, Sampling

Prompt: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, str]]
"""A text, its tokens, or a chat: ``[{"role": "user", "content": "…"}]``."""

OnText: TypeAlias = Callable[[int, str], None]
"""Called with the number of a prompt and the next piece of its text."""

_CONTEXT = 8
"""Tokens of the prompt that the text is decoded behind, so that a space at its beginning survives."""


@dataclass(frozen=True)
class Continuation:
    """What followed one prompt."""

    text: str
    ids: tuple[int, ...]
    """Its tokens, the one that ended it included."""

    prompt_tokens: int
    finish: Literal["eos", "stop", "length"]
    """Why it ended: the model's own end, one of the texts in ``stop``, or ``max_tokens``."""


@dataclass(frozen=True)
class Generated:
    """What followed some prompts, and how long that took."""

    rows: tuple[Continuation, ...]
    prompt_seconds: float
    """Time to read the prompts."""

    seconds: float
    """Time to generate the tokens behind the first."""

    uncached: str | None
    """Why the model took no cache and read everything again for each token; None where it took one."""

    @property
    def text(self) -> str:
        """The text behind the first prompt."""
        return self.rows[0].text

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens of all rows a second, the prompts not counted."""
        made = sum(len(row.ids) - 1 for row in self.rows)
        return made / self.seconds if made else 0.0


def generate(
    graph: Graph,
    tokenizer: Any,
    prompt: Prompt | Sequence[Prompt],
    sampling: Sampling | None = None,
    *,
    chat: bool = False,
    eos: Sequence[int] | None = None,
    stream: OnText | None = None,
) -> Generated:
    """Continue one prompt, or a list of prompts as a batch. ``Generator`` says the rest."""
    return Generator(graph, tokenizer, eos=eos)(_listed(prompt), sampling or Sampling(), chat=chat, stream=stream)


def _listed(prompt: Any) -> list[Prompt]:
    """One prompt as a list of one. A list of numbers is one prompt, and so is a list of messages."""
    if isinstance(prompt, str) or (len(prompt) and isinstance(prompt[0], (int, Mapping))):
        return [prompt]
    return list(prompt)


class Generator:
    """A model that continues any number of prompts.

    Tokens in ``eos`` end a text: without it, those that the configuration of a graph and the tokenizer name.
    """

    def __init__(self, model: Graph | Model, tokenizer: Any, *, eos: Sequence[int] | None = None):
        config = model.config if isinstance(model, Graph) else {}
        self.model: Model = GraphModel(model) if isinstance(model, Graph) else model
        self.tokenizer = tokenizer
        self.eos = frozenset(ends(config, tokenizer) if eos is None else eos)

    def __call__(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, chat: bool = False, stream: OnText | None = None
    ) -> Generated:
        """Continue every prompt. ``chat`` puts texts into the tokenizer's chat template."""
        if not prompts:
            raise QcError("there is no prompt", fix="give a text to go on from")
        talk = chat or any(_is_chat(prompt) for prompt in prompts)
        closing = self.eos | _turn_ends(self.tokenizer) if talk else self.eos
        encoded = [self.encode(prompt, chat) for prompt in prompts]
        rows = [_Row(self.tokenizer, closing, i, ids, sampling, stream) for i, ids in enumerate(encoded)]
        longest = max(len(row.prompt) for row in rows)
        self._fits(longest, sampling.max_tokens)
        padding = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        reader = self.model.reader([row.prompt for row in rows], longest + sampling.max_tokens, padding)
        choose = Chooser(sampling, len(rows), self.model.device)
        with torch.inference_mode():
            began = time.perf_counter()
            logits = reader.start()
            read = time.perf_counter()
            for step in range(sampling.max_tokens):
                tokens = choose(logits, [row.prompt + row.ids for row in rows])
                for row, token in zip(rows, tokens.tolist(), strict=True):
                    row.push(token, last=step + 1 == sampling.max_tokens)
                if all(row.finish for row in rows):
                    break
                logits = reader.next(tokens)
        done = tuple(row.result() for row in rows)
        return Generated(done, read - began, time.perf_counter() - read, self.model.uncached)

    def encode(self, prompt: Prompt, chat: bool = False) -> list[int]:
        """The tokens of a prompt, checked."""
        if isinstance(prompt, str) and chat:
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(prompt, str):
            ids = list(self.tokenizer(prompt)["input_ids"])
        elif _is_chat(prompt):
            ids = self._chat(prompt)
        else:
            ids = [token for token in prompt if isinstance(token, int)]
        if not ids:
            raise QcError("the prompt is empty", fix="give a text to go on from")
        known = self.model.vocabulary
        foreign = next((token for token in ids if not 0 <= token < known), None)
        if foreign is not None:
            what = f"the prompt has token {foreign}, the model knows {known}"
            raise QcError(what, fix="use the tokenizer that belongs to the model")
        return ids

    def _chat(self, messages: Any) -> list[int]:
        if not getattr(self.tokenizer, "chat_template", None):
            fix = "generate without chat, or put chat_template.jinja beside the model"
            raise QcError("the tokenizer has no chat template", fix=fix)
        return list(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    def _fits(self, prompt: int, more: int) -> None:
        limit = self.model.limit
        if limit is None or prompt + more <= limit:
            return
        room = limit - prompt
        raise QcError(
            f"a prompt of {prompt} tokens and {more} more exceed the model's {limit} positions",
            fix=f"lower max_tokens to {room}" if room > 0 else "shorten the prompt",
        )


class _Row:
    """One prompt, and what follows it."""

    def __init__(
        self,
        tokenizer: Any,
        ends: frozenset[int],
        number: int,
        prompt: list[int],
        sampling: Sampling,
        stream: OnText | None,
    ):
        self.ends, self.number, self.prompt, self.on_text = ends, number, prompt, stream
        self.pieces = TextStream(tokenizer, prompt[-_CONTEXT:])
        self.stops = StopFinder(sampling.stop)
        self.ids: list[int] = []
        self.text = ""
        self.finish: Literal["eos", "stop", "length"] | None = None

    def push(self, token: int, *, last: bool) -> None:
        if self.finish:
            return
        self.ids.append(token)
        ended = token in self.ends
        self._show(self.stops.push(self.pieces.flush() if ended else self.pieces.push(token)))
        if self.stops.found:
            self.finish = "stop"
        elif ended or last:
            self.finish = "eos" if ended else "length"
            self._show(self.stops.push(self.pieces.flush()))
            self._show(self.stops.flush())

    def _show(self, text: str) -> None:
        self.text += text
        if text and self.on_text is not None:
            self.on_text(self.number, text)

    def result(self) -> Continuation:
        assert self.finish is not None
        return Continuation(self.text, tuple(self.ids), len(self.prompt), self.finish)


def ends(config: Mapping[str, Any], tokenizer: Any, folder: Path | None = None) -> list[int]:
    """The tokens that end a text: those of the model, the tokenizer's, and those of ``generation_config.json``.

    Many chat models name the end of a turn only in that file, which lies in ``folder``.
    """
    named = [config.get("eos_token_id"), tokenizer.eos_token_id]
    path = folder / "generation_config.json" if folder is not None else None
    if path is not None and path.is_file():
        try:
            named.append(json.loads(path.read_text()).get("eos_token_id"))
        except (ValueError, AttributeError):
            raise QcError(f"{path} is not a generation configuration", fix="repair it, or remove it") from None
    listed = [token for one in named for token in (one if isinstance(one, (list, tuple)) else [one])]
    return [token for token in dict.fromkeys(listed) if isinstance(token, int)]


def _is_chat(prompt: Prompt) -> bool:
    return not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _turn_ends(tokenizer: Any) -> frozenset[int]:
    """The special token that the chat template puts behind an answer; often it is not the end of a text."""
    if not getattr(tokenizer, "chat_template", None):
        return frozenset()
    answer = "qc"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    behind = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(answer)[2]
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"]
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return frozenset(ids[:1]) & special
