"""Chats with and without thoughts, for templates that know ``enable_thinking``.

The templates that know it look at the switch only where an answer is yet to come; what earlier answers thought is
written out or dropped whatever it says. So without thinking, thoughts are taken out of the chat itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from graph.errors import QcError

SWITCH = "enable_thinking"
_THOUGHTS = re.compile(r"\A\s*<think>.*?</think>\s*", re.DOTALL)
_APART = ("reasoning_content", "reasoning", "thinking")
"""Keys under which data sets keep thoughts beside the content."""


class Thinking:
    """A tokenizer whose chat template is told to think, or not to; in all else the tokenizer itself."""

    def __init__(self, tokenizer: Any, *, enabled: bool):
        template = getattr(tokenizer, "chat_template", None)
        if SWITCH not in str(template):
            raise QcError(
                "the chat template knows no enable_thinking, so there is nothing that thinking could choose"
                if template
                else "the tokenizer has no chat template, so there is nothing that thinking could choose",
                fix="take thinking out of cache",
            )
        self._tokenizer, self._enabled = tokenizer, enabled
        self.chat_template = f"{template}{{# {SWITCH}: {enabled} #}}"  # what tokens are remembered by

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, *texts: Any, **options: Any) -> Any:
        return self._tokenizer(*texts, **options)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Any:
        """The chat as text, with the switch set."""
        said = list(messages) if self._enabled else [thoughtless(message) for message in messages]
        return self._tokenizer.apply_chat_template(said, **{SWITCH: self._enabled}, **options)


def thoughtless(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without what was thought before it was said.

    >>> thoughtless({"role": "assistant", "content": "<think>2 and 2</think> 4", "reasoning_content": "2 and 2"})
    {'role': 'assistant', 'content': '4'}
    """
    kept = {key: value for key, value in message.items() if key not in _APART}
    if message.get("role") == "assistant" and isinstance(kept.get("content"), str):
        kept["content"] = _THOUGHTS.sub("", kept["content"])
    return kept
