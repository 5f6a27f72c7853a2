import threading
from collections.abc import Iterator

import pytest
import torch

from graph.formats.ahead import worked_ahead


def test_results_come_in_the_order_of_the_items_whichever_is_done_first() -> None:
    second_is_done = threading.Event()

    def work(item: int) -> int:
        if item == 0:
            assert second_is_done.wait(10)
        elif item == 1:
            second_is_done.set()
        return item * item

    assert list(worked_ahead(work, range(5), threads=2)) == [0, 1, 4, 9, 16]


@pytest.mark.parametrize(("threads", "waiting", "most"), [(1, 1, 1), (1, 4, 1), (3, 1, 4), (2, 4, 6)])
def test_no_more_items_wait_than_are_asked_to(threads: int, waiting: int, most: int) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(9):
            taken.append(item)
            yield item

    results = worked_ahead(lambda item: item, items(), threads, waiting)
    assert next(results) == 0 and len(taken) == most


def test_no_thread_idles_while_the_first_item_is_not_done() -> None:
    third_is_done = threading.Event()

    def work(item: int) -> int:
        if item == 0:
            assert third_is_done.wait(10)
        elif item == 2:
            third_is_done.set()
        return item

    assert list(worked_ahead(work, range(4), threads=2)) == [0, 1, 2, 3]


@pytest.mark.parametrize("threads", [1, 2])
def test_what_goes_wrong_is_raised_at_its_turn_and_ends_the_work(threads: int) -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 2:
            raise ValueError("two")
        return item

    results = worked_ahead(work, range(9), threads)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(results)
    assert max(begun) <= 4


def test_steps_inside_have_one_thread_and_those_outside_keep_theirs() -> None:
    before = torch.get_num_threads()
    inside = list(worked_ahead(lambda _: torch.get_num_threads(), range(4), threads=2))
    assert inside == [1, 1, 1, 1] and torch.get_num_threads() == before
