from __future__ import annotations

import pytest

from graph import QcError
from runtimes.data import Document
from runtimes.data.chat import parts
from tests.runtimes.data.byte_tokenizer import CHAT, byte_tokenizer

TURNS = (
    {"role": "user", "content": "a?"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c?"},
    {"role": "assistant", "content": "d"},
)

FORGETS = (  # like Qwen3: an answer's thoughts are dropped once others follow
    "{% for m in messages %}<|start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def test_only_the_assistant_is_trained_on_and_each_turn_behind_its_own_prompt() -> None:
    assert parts(Document("", messages=TURNS), byte_tokenizer()) == [
        [
            ("<|start|>user\na?<|end|>\n<|start|>assistant\n", False),
            ("b<|end|>\n", True),
            ("<|start|>user\nc?<|end|>\n<|start|>assistant\n", False),
            ("d<|end|>\n", True),
        ]
    ]


def test_a_template_that_rewrites_earlier_turns_gives_a_document_for_each_answer() -> None:
    first, second = parts(Document("", messages=TURNS), byte_tokenizer(chat=FORGETS))
    assert first == [("<|start|>user\na?<|end|>\n<|start|>assistant\n", False), ("<think></think>b<|end|>\n", True)]
    assert second == [
        (
            "<|start|>user\na?<|end|>\n<|start|>assistant\nb<|end|>\n<|start|>user\nc?<|end|>\n<|start|>assistant\n",
            False,
        ),
        ("<think></think>d<|end|>\n", True),
    ]


def test_a_chat_without_an_answer_teaches_nothing() -> None:
    assert parts(Document("", messages=TURNS[:1]), byte_tokenizer()) == []


def test_a_tokenizer_without_a_template_cannot_write_chats() -> None:
    with pytest.raises(QcError) as caught:
        parts(Document("", messages=TURNS), byte_tokenizer(chat=None))
    assert str(caught.value) == (
        "the data holds chats, but the tokenizer has no chat template\n"
        "  fix    use a chat model's tokenizer, or prompt and response columns"
    )


def test_what_a_template_refuses_is_shown() -> None:
    picky = "{{ raise_exception('roles must alternate') if messages|length > 1 }}" + CHAT
    with pytest.raises(QcError) as caught:
        parts(Document("", messages=TURNS[:2]), byte_tokenizer(chat=picky))
    assert str(caught.value) == (
        "the chat template refuses a chat of user, assistant: roles must alternate\n"
        "  fix    repair the chat, or its order of roles"
    )


def test_a_template_whose_answers_do_not_follow_its_prompt_is_refused() -> None:
    broken = CHAT.replace(
        "{% if add_generation_prompt %}<|start|>assistant\n", "{% if add_generation_prompt %}<|start|>bot\n"
    )
    with pytest.raises(QcError) as caught:
        parts(Document("", messages=TURNS[:2]), byte_tokenizer(chat=broken))
    assert str(caught.value) == (
        "the chat template writes an answer differently from the prompt that generation uses\n"
        "  fix    use a template whose add_generation_prompt is the beginning of an assistant's turn"
    )
