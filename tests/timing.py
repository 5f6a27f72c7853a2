"""CPU times of steps beside each other, on a machine that does other things too."""

from collections.abc import Callable, Mapping
from time import process_time
from typing import Any

ROUNDS = 60


def least_times(steps: Mapping[str, Callable[[], Any]], enough: Callable[[dict[str, float]], bool]) -> dict[str, float]:
    """The least CPU seconds of each step, in turns; no more turns than make ``enough`` of them true, or ``ROUNDS``.

    What else runs only ever adds to a time: the least of more turns is nearer to what the step itself takes.
    """
    least = dict.fromkeys(steps, float("inf"))
    for round_ in range(ROUNDS):
        for name, step in steps.items():
            start = process_time()
            step()
            least[name] = min(least[name], process_time() - start)
        if round_ >= 4 and enough(least):
            break
    return least
