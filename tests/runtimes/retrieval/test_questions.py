"""Questions: the same wherever they are asked, with one answer each, and batches of them."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from graph.errors import QcError
from runtimes.data.batches import IGNORED
from runtimes.retrieval import Asked, Example, Questions
from runtimes.retrieval.dice import Dice
from runtimes.retrieval.example import Split, split_of
from runtimes.retrieval.needle import KINDS, Kind
from runtimes.settings import Retrieval
from tests.runtimes.data.byte_tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
TASKS = ("lookup", "needle", "docstrings")


def questions(data: Retrieval, split: Split = "train", seed: int = 0, length: int = 256) -> Questions:
    return Questions(data, split, tokenizer=TOKENIZER, memory_tokenizer=TOKENIZER, length=length, seed=seed)


# -- the numbers ----------------------------------------------------------------------------------------------------


def test_numbers_follow_from_what_is_said_and_are_the_same_for_ever() -> None:
    assert [Dice(0, "train", n).below(1000) for n in range(4)] == [527, 745, 667, 361]
    dice = Dice("a", 1)
    assert [dice.below(10) for _ in range(8)] == [2, 1, 7, 7, 4, 7, 8, 9]
    assert Dice("a", 1).below(10**9) != Dice("a", "1").below(10**9)


def test_every_number_is_as_likely() -> None:
    dice, counts = Dice("even"), [0] * 7
    for _ in range(7000):
        counts[dice.below(7)] += 1
    assert min(counts) > 900
    assert max(counts) < 1100
    assert sum(dice.chance(0.2) for _ in range(5000)) == pytest.approx(1000, abs=100)
    orders = set()
    for _ in range(200):
        order = list("abc")
        dice.shuffle(order)
        orders.add("".join(order))
    assert len(orders) == 6


# -- examples -------------------------------------------------------------------------------------------------------


@cache
def pattern(kind: Kind) -> re.Pattern[str]:
    """What matches a statement of a kind, and finds its key and value."""
    key, value = "([A-Za-z0-9_]+)", r"([^ ]+(?: [A-Z][a-z]+ \d+)?)"
    return re.compile(rf"(?<!\w){kind.statement.rstrip('.').format(key=key, value=value)}\.(?: |\n|$)")


def statements(example: Example) -> list[tuple[str, str, str]]:
    """Kind, key and value of every statement in the chunks of a needle."""
    text = "\n".join(example.chunks)
    return [(kind.statement, key, value) for kind in KINDS for key, value in pattern(kind).findall(text)]


def test_of_4000_needles_none_has_a_second_answer_and_none_is_marked_by_two_full_stops() -> None:
    made, shown = questions(Retrieval(retrieval="needle", hard=0.5, chunks=6, asks=2)), 0
    for number in range(2000):
        example = made.example(number)
        told = statements(example)
        for asked in example.asked:
            (kind,) = [k for k in KINDS if k.question.format(key=asked.key) == asked.question]
            answers = [(at, value) for at, key, value in told if (at, key) == (kind.statement, asked.key)]
            assert answers == [(kind.statement, asked.answer)], example
            assert kind.statement.format(key=asked.key, value=asked.answer) in example.chunks[asked.chunk]
        assert not any(".." in chunk for chunk in example.chunks)
        assert len({(at, key) for at, key, _ in told}) == len(told)
        shown += len(told) - 2
    assert shown / 2000 == pytest.approx(0.5 * 6 * 2, rel=0.05)


@pytest.mark.parametrize("data", [
    Retrieval(retrieval="lookup", hard=0.5),
    Retrieval(retrieval="lookup", names="words", key=2, value=1, entries=2, filler=0, hard=0.5, asks=3),
])  # fmt: skip
def test_a_table_has_the_key_once_and_keys_that_look_like_it(data: Retrieval) -> None:
    made, near = questions(data), 0
    for number in range(1000):
        example = made.example(number)
        lines = [line for chunk in example.chunks for line in chunk.split("\n") if not line.endswith(".")]
        assert len(lines) == data.chunks * data.entries
        table = [re.fullmatch(r"(?:the value of )?(.+?)(?:: | = | is )(.+)", line) for line in lines]
        pairs: list[tuple[str, str]] = [(match[1], match[2]) for match in table if match]
        keys, values = [key for key, _ in pairs], [value for _, value in pairs]
        assert len(set(keys)) == len(set(values)) == len(lines)
        for asked in example.asked:
            assert dict(pairs)[asked.key] == asked.answer
            assert any(line.endswith(asked.answer) for line in example.chunks[asked.chunk].split("\n"))
        wanted = _parts(example.asked[0].key, data)
        apart = (sum(a != b for a, b in zip(_parts(key, data), wanted, strict=True)) for key in keys)
        near += sum(count == 1 for count in apart)
    assert near / 1000 > 0.3 * (data.chunks * data.entries - 1)


def _parts(key: str, data: Retrieval) -> list[str]:
    return key.split(" ") if data.names == "words" else list(key)


def test_a_function_is_told_of_once_beside_others_of_its_module() -> None:
    made = questions(Retrieval(retrieval="docstrings", hard=1.0))
    for number in range(200):
        example = made.example(number)
        text = "\n\n".join(example.chunks)
        (asked,) = example.asked
        assert text.count(f"def {asked.key}(") == 1
        assert text.count("def ") >= 12
        assert f'"""{asked.answer}"""' in example.chunks[asked.chunk]


@pytest.mark.parametrize("task", TASKS)
def test_no_key_of_a_held_out_question_is_in_any_training(task: Any) -> None:
    data = Retrieval(retrieval=task, names="words", key=1, entries=2)
    trained = [questions(data).example(n) for n in range(300)]
    held_out = [questions(data, "heldout").example(n) for n in range(300)]
    assert {split_of(asked.key) for one in trained for asked in one.asked} == {"train"}
    assert {split_of(asked.key) for one in held_out for asked in one.asked} == {"heldout"}
    if task == "lookup":
        lines = [
            re.split(": | = | is ", line)[0] for one in held_out for chunk in one.chunks for line in chunk.split("\n")
        ]
        assert {split_of(line.removeprefix("the value of ")) for line in lines if not line.endswith(".")} == {"heldout"}


@pytest.mark.parametrize("task", TASKS)
def test_a_question_is_the_same_in_whatever_order_it_is_asked(task: Any) -> None:
    data = Retrieval(retrieval=task, chunk_length=512)
    one, other = questions(data, seed=3), questions(data, seed=3)
    assert [one.example(n) for n in range(20)] == [other.example(n) for n in reversed(range(20))][::-1]
    assert one.example(5) != questions(data, seed=4).example(5)
    whole, parts = one.shuffled(8, 4), [other.shuffled(n, 1) for n in range(8, 12)]
    assert whole.examples == tuple(example for part in parts for example in part.examples)


def test_an_example_is_what_it_was_when_this_was_written() -> None:
    def example(task: Any) -> Example:
        return questions(Retrieval(retrieval=task, chunks=2, filler=1, entries=2), seed=5).example(123456789)

    fact = "The length of the bridge at Treamvi in metres is 70014."
    bridge = Asked("How many metres long is the bridge at Treamvi?", "Treamvi", "70014", 0, "numeric")
    chunks = (
        f"{fact} The travellers talked about the small garden.",
        "A quiet path leads from the river to the next one.",
    )
    assert example("needle") == Example(chunks, (bridge,))
    first = "s2ci = 1wfkok\nRain fell on the library after lunch.\nuet7 = ydhih8"
    second = "The road behind the kitchen stayed cold in the morning.\ness4 = u4f1qq\nqadl = n66krq"
    entry = Asked("What is the value of s2ci?", "s2ci", "1wfkok", 0, "lookup")
    assert example("lookup") == Example((first, second), (entry,))


def test_chunks_rise_with_the_number_of_the_question_whatever_its_task() -> None:
    data = Retrieval(retrieval={"lookup": 1, "needle": 1}, first_chunks=1, chunks=4, curriculum=300)
    made = questions(data)
    counts = [len(made.example(n).chunks) for n in (0, 99, 100, 199, 200, 299, 300, 10**12)]
    assert counts == [1, 1, 2, 2, 3, 3, 4, 4]
    later = questions(replace(data, first_questions=1000))
    assert [later.chunks(n) for n in (0, 999, 1000, 1099, 1100, 1299, 1300)] == [1, 1, 1, 1, 2, 3, 4]
    at_once = questions(replace(data, first_questions=1000, curriculum=0))
    assert [at_once.chunks(n) for n in (0, 999, 1000, 1001)] == [1, 1, 4, 4]
    assert {len(questions(data, "heldout").example(n).chunks) for n in range(20)} == {4}


def test_a_mixture_is_interleaved_by_its_weights() -> None:
    made = questions(Retrieval(retrieval={"lookup": 3, "needle": 1}))
    for first in (0, 10**6):
        tables = sum(made.example(n).asked[0].category == "lookup" for n in range(first, first + 1000))
        assert tables == pytest.approx(750, abs=45)


# -- batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_only_answers_and_their_ends_are_learned_each_behind_its_prompt(task: Any) -> None:
    made = questions(Retrieval(retrieval=task, asks=3, chunk_length=512), length=512)
    batch = made.shuffled(0, 3)
    for row, example in enumerate(batch.examples):
        assert len(example.asked) == 3
        for number, asked in enumerate(example.asked, 1):
            own = batch.attention_mask[row] == number
            ids, labels = batch.input_ids[row][own], batch.labels[row][own]
            assert TOKENIZER.decode(ids) == f"Question: {asked.question}\nAnswer: {asked.answer}"
            learned = labels != IGNORED
            assert TOKENIZER.decode(labels[learned]) == f" {asked.answer}<|end|>"
            assert torch.equal(ids[1:][learned[:-1]], labels[learned][:-1])
    assert (batch.attention_mask[:, -1] > 0).any(), "no column is padding alone"
    assert (batch.labels[batch.attention_mask == 0] == IGNORED).all()
    assert (batch.input_ids[batch.attention_mask == 0] == 256).all()


def test_memory_has_the_chunks_in_the_tokens_of_the_encoder() -> None:
    bos = byte_tokenizer(bos="<|start|>")
    data = Retrieval(retrieval="needle", first_chunks=1, chunks=3, curriculum=2)
    batch = Questions(data, "train", tokenizer=TOKENIZER, memory_tokenizer=bos, length=256).shuffled(0, 4)
    assert batch.memory_ids is not None
    assert batch.memory_mask is not None
    assert batch.memory_ids.shape[:2] == batch.memory_mask.shape[:2] == (4, 3)
    assert [len(one.chunks) for one in batch.examples] == [1, 2, 3, 3]
    for row, example in enumerate(batch.examples):
        for at in range(3):
            tokens = batch.memory_ids[row, at][batch.memory_mask[row, at] == 1]
            assert TOKENIZER.decode(tokens) == (f"<|start|>{example.chunks[at]}" if at < len(example.chunks) else "")


def test_the_key_of_the_rows_changes_with_all_that_they_are_made_of() -> None:
    data = Retrieval(retrieval="lookup")
    others = [
        questions(data), questions(data, "heldout"), questions(data, seed=1), questions(data, length=64),
        questions(replace(data, hard=0.3)),
        Questions(data, "train", tokenizer=TOKENIZER, memory_tokenizer=byte_tokenizer(bos="<|start|>"), length=256),
    ]  # fmt: skip
    assert len({one.key for one in others}) == len(others)
    assert questions(data).key == others[0].key


# -- errors ---------------------------------------------------------------------------------------------------------


def said(call: Any) -> str:
    with pytest.raises(QcError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize(("options", "text"), [
    ({"ask": "{colour}?"}, "ask has {colour}, which nothing fills\n  fix    write {question} and {key}, and {{ for a brace"),
    ({"ask": "What?"}, "ask names neither question nor key\n  fix    write {question} or {key} where it belongs"),
    ({"ask": "{key"}, "ask has {{key}, which nothing fills\n  fix    write {question} and {key}, and {{ for a brace"),
    ({"forms": ("{key}",)}, "forms has a line without key and value\n  fix    write {key} and {value} in each"),
    ({"forms": ()}, "forms is empty\n  fix    give the form of a line, or leave forms out"),
    ({"retrieval": {"riddle": 1}}, "retrieval has no task 'riddle'\n  fix    write lookup or needle or docstrings"),
    ({"retrieval": {"lookup": 0}}, "retrieval gives lookup a weight of 0\n  fix    give a weight above 0"),
    ({"retrieval": {}}, "retrieval names no task\n  fix    write lookup or needle or docstrings"),
])  # fmt: skip
def test_options_that_cannot_be_meant(options: dict[str, Any], text: str) -> None:
    assert said(lambda: Retrieval(**{"retrieval": "lookup", **options})) == text


def test_what_does_not_fit_is_told_and_never_cut() -> None:
    long = questions(Retrieval(retrieval="lookup"), length=20)
    assert said(lambda: long.shuffled(0, 2)) == (
        "what is asked of some chunks has 51 tokens with its answers, and a row 20\n"
        "  fix    raise length to 51 at least, or lower asks"
    )
    wide = questions(Retrieval(retrieval="needle", chunk_length=16))
    assert said(lambda: wide.shuffled(0, 2)).endswith(
        "tokens of the encoder, and chunk_length is 16\n"
        "  fix    raise chunk_length, or ask for fewer entries and sentences in a chunk"
    )
    few = questions(Retrieval(retrieval="lookup", names="words", key=1, entries=100), "heldout")
    assert said(lambda: few.example(0)) == (
        "there are not enough keys for the chunks of a question\n"
        "  fix    ask for fewer chunks or entries, or for longer keys and values"
    )


def test_both_tokenizers_are_needed() -> None:
    data = Retrieval(retrieval="lookup")
    missing = [
        ({"tokenizer": None, "memory_tokenizer": TOKENIZER}, "there is no tokenizer of the decoder"),
        ({"tokenizer": TOKENIZER, "memory_tokenizer": None}, "there is no tokenizer of the encoder"),
    ]
    for given, what in missing:
        text = said(lambda given=given: Questions(data, "train", length=64, **given))
        assert text == f"{what}\n  fix    put tokenizer.json beside its config.json"
    endless = byte_tokenizer(eos=None)
    assert said(lambda: Questions(data, "train", length=64, tokenizer=endless, memory_tokenizer=TOKENIZER)) == (
        "the tokenizer has no end-of-sequence token, so the model cannot learn to stop\n"
        "  fix    set eos_token in tokenizer_config.json"
    )
