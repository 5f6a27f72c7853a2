"""The table of a lowering: op of the graph -> the function that emits it for a target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Emit = TypeVar("Emit", bound=Callable[..., Any])


class Emitters(dict[str, Emit]):
    """Filled by the modules that have the functions, each op by one of them."""

    def lowers(self, *ops: str) -> Callable[[Emit], Emit]:
        """Make a function the lowering of these ops."""

        def register(function: Emit) -> Emit:
            for op in ops:
                assert op not in self, f"two lowerings for {op}"
                self[op] = function
            return function

        return register
