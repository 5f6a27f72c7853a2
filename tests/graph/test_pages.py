"""Memory for large tensors, and memory that is lent to one after the other."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from graph.formats import memory
from graph.formats.memory import lent
from graph.pages import LARGE, room


@pytest.mark.parametrize("size", [0, 5, LARGE - 1, LARGE, LARGE + 12345])
def test_a_room_has_as_many_bytes_as_asked_for_and_can_be_written_to(size: int) -> None:
    given = room(size)
    assert given.dtype == torch.uint8 and given.shape == (size,)
    assert int(given.fill_(3).sum()) == 3 * size
    assert given.data_ptr() % 64 == 0, "any dtype can be read there"


def test_rooms_are_apart() -> None:
    one, two = room(LARGE).fill_(1), room(LARGE).fill_(2)
    assert (int(one[0]), int(one[-1]), int(two[0])) == (1, 1, 2)


def test_what_is_lent_is_the_same_memory_each_time_and_another_in_each_thread() -> None:
    first = lent(1000).data_ptr()
    assert lent(500).data_ptr() == first
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: lent(500).data_ptr()).result() != first


def test_too_much_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LENT", 100)
    one, two = lent(101).fill_(1), lent(101).fill_(2)
    assert len(one) == 101 and int(one[0]) == 1 and int(two[0]) == 2
