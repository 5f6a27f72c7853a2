"""A fact among sentences that say nothing: one statement to be found, in a random place of a random chunk.

Every statement is about a made-up key and ends in a made-up value. A share of the other sentences are statements too,
half of them of the asked kind; none has both its kind and its key, so that one answer is right and no other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from runtimes.retrieval.dice import Dice
from runtimes.retrieval.example import Asked, Example, Split, drawn, split_of
from runtimes.retrieval.fillers import filler
from runtimes.retrieval.words import WORDS, letters, name
from runtimes.settings import Retrieval

_MONTHS = ("January", "March", "April", "May", "June", "July", "August", "September", "October", "December")


def _identifier(dice: Dice) -> str:
    return f"{dice.choice(WORDS)}_{dice.choice(WORDS)}_{dice.below(100)}"


def _date(dice: Dice) -> str:
    return f"{1 + dice.below(28)} {dice.choice(_MONTHS)} {1000 + dice.below(1000)}"


def _hour(dice: Dice) -> str:
    return f"{dice.below(24):02}:{dice.below(60):02}"


def _number(dice: Dice) -> str:
    return str(100 + dice.below(99900))


def _version(dice: Dice) -> str:
    return f"{dice.below(30)}.{dice.below(30)}.{dice.below(100)}"


def _code(dice: Dice) -> str:
    return letters(dice, 4 + dice.below(5))


@dataclass(frozen=True)
class Kind:
    """A kind of statement: what it says, what is asked, and what its key and value look like."""

    category: str
    statement: str
    question: str
    key: Callable[[Dice], str]
    value: Callable[[Dice], str]


KINDS: tuple[Kind, ...] = (
    Kind("simple", "The password of {key} is {value}.", "What is the password of {key}?", name, _code),
    Kind("simple", "The locker of {key} opens with {value}.", "What opens the locker of {key}?", name, _code),
    Kind("simple", "The secret word in {key} is {value}.", "What is the secret word in {key}?", name, name),
    Kind("entity", "{key} lives in the town of {value}.", "In which town does {key} live?", name, name),
    Kind("entity", "The captain of the ship {key} is {value}.", "Who is the captain of the ship {key}?", name, name),
    Kind("entity", "The teacher of {key} is called {value}.", "What is the teacher of {key} called?", name, name),
    Kind("entity", "The river through {key} is the {value}.", "Which river flows through {key}?", name, name),
    Kind("code", "The function {key} returns {value}.", "What does the function {key} return?", _identifier, _number),
    Kind("code", "The constant {key} is set to {value}.", "What is the constant {key} set to?", _identifier, _number),
    Kind(
        "code",
        "The module {key} needs version {value}.",
        "Which version does the module {key} need?",
        _identifier,
        _version,
    ),
    Kind(
        "code", "Calls of {key} end in the error {value}.", "In which error do calls of {key} end?", _identifier, _code
    ),
    Kind("temporal", "The meeting about {key} is on {value}.", "When is the meeting about {key}?", name, _date),
    Kind("temporal", "The treaty of {key} was signed on {value}.", "When was the treaty of {key} signed?", name, _date),
    Kind("temporal", "The train to {key} leaves at {value}.", "When does the train to {key} leave?", name, _hour),
    Kind(
        "numeric",
        "The warehouse in {key} holds this many crates: {value}.",
        "How many crates does the warehouse in {key} hold?",
        name,
        _number,
    ),
    Kind(
        "numeric",
        "The length of the bridge at {key} in metres is {value}.",
        "How many metres long is the bridge at {key}?",
        name,
        _number,
    ),
    Kind(
        "numeric",
        "The price of item {key} in coins is {value}.",
        "How many coins does item {key} cost?",
        _code,
        _number,
    ),
    Kind("definition", "In the old tongue {key} means {value}.", "What does {key} mean in the old tongue?", name, name),
    Kind("definition", "The short form of {key} is {value}.", "What is the short form of {key}?", name, _code),
    Kind(
        "definition",
        "A stone of the sort {key} is also known as {value}.",
        "As what is a stone of the sort {key} also known?",
        name,
        name,
    ),
    Kind(
        "assertion", "It is certain that {key} depends on {value}.", "What does {key} certainly depend on?", name, name
    ),
    Kind("assertion", "Nobody doubts that {key} was built by {value}.", "Who built {key} beyond doubt?", name, name),
    Kind(
        "assertion",
        "Records confirm that {key} belongs to {value}.",
        "To whom does {key} belong by the records?",
        name,
        name,
    ),
    Kind(
        "assertion", "It is not true that {key} lies far from {value}.", "What does {key} not lie far from?", name, name
    ),
)
"""Statements by category. No value can be guessed: each is one of thousands at least."""


@dataclass
class _Told:
    """What the statements of one example have used up."""

    split: Split
    dice: Dice
    keys: set[tuple[str, str]]
    values: set[str]

    def statement(self, kind: Kind) -> tuple[str, str, str]:
        """Key, value and sentence of a new statement."""
        key = drawn(
            self.dice, kind.key, lambda k: split_of(k) == self.split and (kind.statement, k) not in self.keys, "keys"
        )
        value = drawn(self.dice, kind.value, lambda v: v not in self.values, "values")
        self.keys.add((kind.statement, key))
        self.values.add(value)
        return key, value, kind.statement.format(key=key, value=value)


def needle(data: Retrieval, split: Split, chunks: int, dice: Dice) -> Example:
    """``filler`` sentences in each chunk, and in one of them the statement that is asked for; more, for more asks."""
    told, kinds, asked = _Told(split, dice, set(), set()), [], []
    facts: list[tuple[int, str]] = []
    for _ in range(data.asks):
        kinds.append(kind := dice.choice(KINDS))
        key, value, fact = told.statement(kind)
        facts.append((dice.below(chunks), fact))
        asked.append(Asked(kind.question.format(key=key), key, value, facts[-1][0], kind.category))
    parts = [[_other(told, kinds, data.hard) for _ in range(data.filler)] for _ in range(chunks)]
    for at, fact in facts:
        parts[at].insert(dice.below(len(parts[at]) + 1), fact)
    return Example(tuple(" ".join(sentences) for sentences in parts), tuple(asked))


def _other(told: _Told, asked: Sequence[Kind], hard: float) -> str:
    """A sentence beside those asked for."""
    if not told.dice.chance(hard):
        return filler(told.dice)
    kind = told.dice.choice(asked if told.dice.chance(0.5) else KINDS)
    return told.statement(kind)[2]
