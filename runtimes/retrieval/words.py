"""Words for keys and values, and what is put together from letters.

Each of ``WORDS`` is one token, behind a space, of the shipped model and of MiniLM, so that a small model can point to
it; a list in the code, not one of the tokenizer, so that an example is the same whatever reads it.
"""

from __future__ import annotations

from runtimes.retrieval.dice import Dice

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"

_ONSETS = ("b", "br", "d", "dr", "f", "g", "gr", "h", "k", "l", "m", "n", "p", "r", "s", "st", "t", "tr", "v", "z")
_NUCLEI = ("a", "e", "i", "o", "u", "ai", "ea", "ou")
_CODAS = ("", "l", "m", "n", "r", "s", "nd", "rk")

_WORDS = """
    above act action add address after again all allow already also always and another any are argument assert
    attribute available await back bad bar base because been before being between block bound break buffer bug
    build but byte bytes call called can cannot case cause change character check child chunk class client close
    code command comment contain content context copy count create current custom data date default directory
    display document does done each either element else email empty encoding end entry equal error even event
    exact example exit expected extra fail field file final find first fix flag float follow for form format
    found frame from function get given got group handle handler hash have header help here host idle ignore
    implement import include index information initial input inspect instance instead integer into invalid item
    its just key last left length let level like limit line link list load local lock log long look loop main
    make manager map mapping master match math may member memory message method min missing mock mode module
    more most multiple must name named need new next node not now number object offset old one only open
    operator option order other out output over pack package parameter parent part pass path pattern per
    platform point port position possible prefix print process protocol raise random range raw read real recent
    reference replace request resource response rest result return right root run running same script search
    second section see select self send sent sequence server set shape should show sign signal since single size
    skip socket some source special specified stack standard start state still stop stream string such suite
    super support sure syntax system table tag take target task test text than that the their them then there
    these they this thread through time token too top trace true try two type under until use used user uses
    using valid value variable version wait want was what when where which width will window with without work
    would wrap write yield you zero
"""

WORDS = tuple(_WORDS.split())


def letters(dice: Dice, count: int) -> str:
    """So many letters and digits."""
    return "".join(dice.choice(LETTERS) for _ in range(count))


def some_words(dice: Dice, count: int, among: int | None = None) -> str:
    """So many words, a space between them, out of the first ``among``."""
    return " ".join(dice.choice(WORDS[:among]) for _ in range(count))


def name(dice: Dice) -> str:
    """A word that can be pronounced and means nothing: ``Braindour``.

    >>> name(Dice(1))[0].isupper()
    True
    """
    syllables = (dice.choice(_ONSETS) + dice.choice(_NUCLEI) + dice.choice(_CODAS) for _ in range(2 + dice.below(2)))
    return "".join(syllables).capitalize()
