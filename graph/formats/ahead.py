"""Work on several weights at once, each on a thread of its own, and hand out what was made in the order of the weights.

The many small steps of a fit gain little from the threads of one step, and everything from the cores of the machine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def worked_ahead(
    work: Callable[[T], R], items: Iterable[T], threads: int | None = None, waiting: int = 1
) -> Iterator[R]:
    """``map(work, items)``, with as many items in work as torch has threads; steps inside have one thread.

    Items are taken as they are needed: no more than ``waiting`` are there beyond those in work, so that no thread idles
    while an earlier item is not done, or while whoever asks for them is busy with one. What ``work`` raises is raised
    at its item's turn, and what has not begun by then never does.
    """
    threads = threads or torch.get_num_threads()
    if threads == 1:
        yield from map(work, items)
        return
    begun: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(threads, "qc-pack", initializer=torch.set_num_threads, initargs=(1,))
    try:
        for item in items:
            begun.append(pool.submit(work, item))
            del item
            if len(begun) >= threads + waiting:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
