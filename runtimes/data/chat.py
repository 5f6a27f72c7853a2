"""From a document to the pieces of text that are, and are not, trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from graph.errors import QcError
from runtimes.data.sources import Document

Part: TypeAlias = tuple[str, bool]
"""A piece of text, and whether it is trained on."""


def parts(document: Document, tokenizer: Any) -> list[list[Part]]:
    """What to learn from a document; a chat may come out as several, one for each of its answers.

    >>> parts(Document("4", prompt="2 + 2 ="), tokenizer=None)
    [[('2 + 2 =', False), ('4', True)]]
    """
    if document.messages is not None:
        return _chat(document.messages, tokenizer)
    if document.prompt is not None:
        return [[(document.prompt, False), (document.text, True)]]
    return [[(document.text, True)]]


def _chat(messages: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[list[Part]]:
    """The turns of the assistant are trained on, each as it follows the prompt that generation will use.

    Some templates write a turn differently once others follow it (they drop its thoughts). Then every answer becomes
    a document of its own, behind the turns before it as the model will see them.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise QcError(
            "the data holds chats, but the tokenizer has no chat template",
            fix="use a chat model's tokenizer, or prompt and response columns",
        )
    answers = [_answer(messages[: i + 1], tokenizer) for i, m in enumerate(messages) if m["role"] == "assistant"]
    one: list[Part] = []
    for before, answer in answers:
        written = "".join(text for text, _ in one)
        if not before.startswith(written):
            return [[(b, False), (a, True)] for b, a in answers]
        one += [(before[len(written) :], False), (answer, True)]
    return [one] if one else []


def _answer(messages: Sequence[Mapping[str, Any]], tokenizer: Any) -> tuple[str, str]:
    """What stands before the last message when it is generated, and the message with what closes it."""
    from jinja2.exceptions import TemplateError

    try:
        before = tokenizer.apply_chat_template(list(messages[:-1]), tokenize=False, add_generation_prompt=True)
        through = tokenizer.apply_chat_template(list(messages), tokenize=False)
    except (TemplateError, KeyError, IndexError, TypeError) as error:
        roles = ", ".join(str(m["role"]) for m in messages)
        raise QcError(
            f"the chat template refuses a chat of {roles}: {error}", fix="repair the chat, or its order of roles"
        ) from None
    if not through.startswith(before):
        raise QcError(
            "the chat template writes an answer differently from the prompt that generation uses",
            fix="use a template whose add_generation_prompt is the beginning of an assistant's turn",
        )
    return before, through[len(before) :]
