"""Random numbers that follow from what they are for, not from how many were drawn before.

The numbers are blocks of SHA-256 over what was said and a counter: the same on every machine and in every release of
Python and of its libraries, whoever asks, in whatever order, from whichever process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, MutableSequence, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class Dice:
    """The numbers that belong to ``said``: a seed, a split, the number of an example.

    >>> Dice(0, "train", 7).below(100) == Dice(0, "train", 7).below(100)
    True
    """

    def __init__(self, *said: int | str):
        self._words = _words("\0".join(f"{type(one).__name__}:{one}" for one in said).encode())

    def below(self, limit: int) -> int:
        """A number from 0 to ``limit`` - 1, each as likely."""
        assert limit > 0, "there is something to draw from"
        whole = (1 << 64) - (1 << 64) % limit
        return next(word for word in self._words if word < whole) % limit

    def chance(self, share: float) -> bool:
        """True in this share of all cases."""
        return next(self._words) < share * 2**64

    def choice(self, options: Sequence[T]) -> T:
        """One of them."""
        return options[self.below(len(options))]

    def shuffle(self, options: MutableSequence[Any]) -> None:
        """Put them into an order, each as likely."""
        for last in range(len(options) - 1, 0, -1):
            at = self.below(last + 1)
            options[at], options[last] = options[last], options[at]


def _words(said: bytes) -> Iterator[int]:
    """64-bit numbers without end."""
    block = 0
    while True:
        digest = hashlib.sha256(said + block.to_bytes(8, "little")).digest()
        yield from (int.from_bytes(digest[at : at + 8], "little") for at in range(0, 32, 8))
        block += 1
