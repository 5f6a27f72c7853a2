"""Text as its tokens come: never half a character, never part of a text that may turn out to end the generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

HALF = "\N{REPLACEMENT CHARACTER}"

_PATIENCE = 16
"""Tokens that may wait for the rest of a character. One of UTF-8 has 4 bytes, so what waits longer is not one."""


class Tokenizer(Protocol):
    """What is asked of a tokenizer here."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        """The text of some tokens."""


class TextStream:
    """The text of tokens, piece by piece. The pieces joined are the text of all tokens behind the context."""

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()):
        self.tokenizer = tokenizer
        self.ids = list(context)
        self.begin, self.shown = 0, len(self.ids)

    def push(self, token: int) -> str:
        """The text that is certain now that ``token`` has come."""
        self.ids.append(token)
        if len(self.ids) - self.shown < _PATIENCE and self._text(len(self.ids)).endswith(HALF):
            return ""
        return self.flush()

    def flush(self) -> str:
        """All that is left, half a character included."""
        old = self._text(self.shown)
        new = self._text(len(self.ids))
        self.begin, self.shown = self.shown, len(self.ids)
        return new[len(old) :]

    def _text(self, end: int) -> str:
        ids = self.ids[self.begin : end]
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class StopFinder:
    """Passes text on until one of some texts appears, and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]):
        self.stops = tuple(stops)
        self.held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """What of the text so far may be shown."""
        text = self.held + piece
        places = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if places:
            self.found, self.held = True, ""
            return text[: min(places)]
        keep = max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back for nothing."""
        held, self.held = self.held, ""
        return held
