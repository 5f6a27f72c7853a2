"""Sentences that answer nothing."""

from __future__ import annotations

from runtimes.retrieval.dice import Dice

_THINGS = ("gate", "market", "river", "garden", "library", "harbour", "workshop", "hill", "kitchen", "station")
_QUALITIES = ("quiet", "old", "crowded", "narrow", "bright", "empty", "distant", "small", "busy", "cold")
_PEOPLE = ("visitors", "children", "merchants", "students", "travellers", "neighbours", "guards", "painters")
_TIMES = ("in the morning", "after lunch", "late at night", "all summer", "on most days", "before the rain")
_FORMS = (
    "The {thing} was {quality} {time}.",
    "Some {people} walked past the {thing} {time}.",
    "Few {people} ever noticed how {quality} the {thing} had become.",
    "A {quality} path leads from the {thing} to the next one.",
    "The {people} talked about the {quality} {thing}.",
    "Rain fell on the {thing} {time}.",
    "Nothing much happened at the {quality} {thing} {time}.",
    "Two {people} waited by the {thing} and said little.",
    "The road behind the {thing} stayed {quality} {time}.",
    "Most {people} preferred the {quality} {thing}.",
)


def filler(dice: Dice) -> str:
    """One of a few thousand sentences."""
    said = {
        "thing": dice.choice(_THINGS),
        "quality": dice.choice(_QUALITIES),
        "people": dice.choice(_PEOPLE),
        "time": dice.choice(_TIMES),
    }
    return dice.choice(_FORMS).format(**said)
