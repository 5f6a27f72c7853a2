"""Tables of made-up keys and values: what stands beside a key, only its chunk can tell."""

from __future__ import annotations

from functools import partial

from runtimes.retrieval.dice import Dice
from runtimes.retrieval.example import Asked, Example, Split, drawn, split_of
from runtimes.retrieval.fillers import filler
from runtimes.retrieval.words import LETTERS, WORDS, letters, some_words
from runtimes.settings import Retrieval

QUESTION = "What is the value of {key}?"


def lookup(data: Retrieval, split: Split, chunks: int, dice: Dice) -> Example:
    """``entries`` keys with values in each chunk, and sentences that say nothing; no key and no value comes twice."""
    table: dict[str, str] = {}
    for _ in range(chunks * data.entries):
        table[_key(data, split, table, dice)] = _value(data, table, dice)
    keys = list(table)
    chosen = [keys[at] for at in range(min(data.asks, len(keys)))]
    dice.shuffle(keys)
    parts = []
    for at in range(0, len(keys), data.entries):
        said = [dice.choice(data.forms).format(key=key, value=table[key]) for key in keys[at : at + data.entries]]
        said += [filler(dice) for _ in range(data.filler)]
        dice.shuffle(said)
        parts.append("\n".join(said))
    asked = (
        Asked(QUESTION.format(key=key), key, table[key], keys.index(key) // data.entries, "lookup") for key in chosen
    )
    return Example(tuple(parts), tuple(asked))


def _key(data: Retrieval, split: Split, table: dict[str, str], dice: Dice) -> str:
    """A key that is not in the table yet; nearly one that is, in the share that is hard."""

    def good(key: str) -> bool:
        return key not in table and split_of(key) == split

    if table and data.key > 1 and dice.chance(data.hard):
        known = next(iter(table))
        for _ in range(8 * data.key):
            if good(near := _near(known, data, dice)):
                return near
    draw = partial(letters if data.names == "letters" else some_words, count=data.key)
    return drawn(dice, draw, good, "keys")


def _value(data: Retrieval, table: dict[str, str], dice: Dice) -> str:
    words = partial(some_words, count=data.value, among=data.vocabulary)
    give = partial(letters, count=data.value) if data.names == "letters" else words
    return drawn(dice, give, lambda value: value not in table.values(), "values")


def _near(key: str, data: Retrieval, dice: Dice) -> str:
    """``key`` with another letter, or another word, in one place."""
    parts = list(key) if data.names == "letters" else key.split(" ")
    parts[dice.below(len(parts))] = dice.choice(LETTERS if data.names == "letters" else WORDS)
    return ("" if data.names == "letters" else " ").join(parts)
