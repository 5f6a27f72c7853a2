from __future__ import annotations

import json
from pathlib import Path

import pytest

from graph import QcError
from runtimes.data import Document
from runtimes.data.chat import parts
from runtimes.distill.reader import TeacherCache
from runtimes.distill.thinking import Thinking
from runtimes.settings import JsonLines
from tests.runtimes.data.byte_tokenizer import byte_tokenizer
from tests.runtimes.distill.tiny import settings, write

SWITCHED = (  # like Qwen3: the switch is looked at where an answer is to come, thoughts are written out where there are any
    "{% for m in messages %}<|start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
CHAT = (
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4", "reasoning_content": "twice 2"},
)
ASKED = "<|start|>user\n2 + 2?<|end|>\n<|start|>assistant\n"


@pytest.mark.parametrize(
    ("enabled", "answer"),
    [(True, [(ASKED, False), ("<think>\ntwice 2\n</think>\n\n4<|end|>\n", True)]),
     (False, [(f"{ASKED}<think>\n\n</think>\n\n", False), ("4<|end|>\n", True)])],
)  # fmt: skip
def test_thoughts_are_learned_or_left_out(enabled: bool, answer: list[tuple[str, bool]]) -> None:
    tokenizer = Thinking(byte_tokenizer(chat=SWITCHED), enabled=enabled)
    assert parts(Document("", messages=CHAT), tokenizer) == [answer]


def test_thoughts_within_the_content_are_left_out_too() -> None:
    said = {"role": "assistant", "content": "<think>\ntwice 2\n</think>\n\n4"}
    tokenizer = Thinking(byte_tokenizer(chat=SWITCHED), enabled=False)
    ((_, (answer, _)),) = parts(Document("", messages=(CHAT[0], said)), tokenizer)
    assert answer == "4<|end|>\n"


def test_in_all_else_it_is_the_tokenizer_itself() -> None:
    plain = byte_tokenizer(chat=SWITCHED)
    tokenizer = Thinking(plain, enabled=True)
    assert tokenizer(["ab"])["input_ids"] == plain(["ab"])["input_ids"]
    assert (len(tokenizer), tokenizer.eos_token_id) == (len(plain), plain.eos_token_id)


@pytest.mark.parametrize(
    ("chat", "what"),
    [("{{ messages }}", "the chat template knows no enable_thinking"), (None, "the tokenizer has no chat template")],
)
def test_a_template_without_the_switch_is_refused(chat: str | None, what: str) -> None:
    with pytest.raises(QcError) as caught:
        Thinking(byte_tokenizer(chat=chat), enabled=True)
    assert str(caught.value) == (
        f"{what}, so there is nothing that thinking could choose\n  fix    take thinking out of cache"
    )


@pytest.mark.parametrize("packing", [True, False])
def test_both_kinds_alternate_in_a_cache(tmp_path: Path, packing: bool) -> None:
    chats = [{"messages": [CHAT[0], CHAT[1] | {"content": f"it is {n}"}]} for n in range(30)]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    data = JsonLines(jsonl=str(tmp_path / "chats.jsonl"))
    chosen = settings(data, thinking="both", sequences=9, heldout=2, length=160, packing=packing)
    tokenizer = byte_tokenizer(chat=SWITCHED)
    write(tmp_path / "cache", chosen, tokenizer=tokenizer)
    rows = TeacherCache(tmp_path / "cache").rows("train")
    for number in range(9):
        batch = rows.batch([number])
        text = tokenizer.decode(batch.input_ids[0])
        assert ("twice 2" in text) == (number % 2 == 0), text
        learned = tokenizer.decode(batch.labels[batch.labels >= 0])
        assert learned.startswith("<think>\ntwice 2" if number % 2 == 0 else "it is")
        assert (int(batch.attention_mask.max()) > 1) == packing, "several chats fit into a row"
