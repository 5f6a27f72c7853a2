"""Work divided among processes: each does its share, and each gets everything, in order."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from graph import QcError
from graph.apart import Overtaken, Parcel, Share, divided, sharing

LOADS = [5, 1, 1, 3, 2, 2]


def work(number: int, seen: list[int]) -> Parcel:
    seen.append(number)
    generator = torch.Generator().manual_seed(number)
    tensors = {"b": torch.randn(3, 2, generator=generator).t(), "a": torch.arange(number).to(torch.uint8)}
    return Parcel(tensors, {"number": number, "share": number / 3, "none": None})


def ask(share: Share | None, seen: list[int]) -> list[tuple[int, Parcel]]:
    def asked() -> list[tuple[int, Parcel]]:
        return list(divided("pack", lambda number: work(number, seen), list(enumerate(LOADS)), 1))

    if share is None:
        return asked()
    with sharing(share):
        return [*asked(), *asked()]


def both(folder: Path) -> tuple[list[Any], list[list[int]]]:
    """What two processes, here threads, get of the same work, and what each did."""
    seen: list[list[int]] = [[], []]
    found: list[Any] = [None, None]

    def run(rank: int) -> None:
        found[rank] = ask(Share(folder, rank, 2), seen[rank])

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found, seen


def same(a: list[tuple[int, Parcel]], b: list[tuple[int, Parcel]]) -> bool:
    return len(a) == len(b) and all(
        i == j
        and p.said == q.said
        and list(p.tensors) == list(q.tensors)
        and all(map(torch.equal, p.tensors.values(), q.tensors.values()))
        for (i, p), (j, q) in zip(a, b, strict=True)
    )


def test_each_gets_what_one_alone_would_have_made_and_does_half_of_it(tmp_path: Path) -> None:
    alone = ask(None, [])
    found, seen = both(tmp_path)
    assert same(found[0], [*alone, *alone]) and same(found[1], [*alone, *alone])
    assert sorted(seen[0] + seen[1]) == sorted([*range(6), *range(6)])
    assert [sum(LOADS[n] for n in one) for one in seen] == [14, 14]


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    both(tmp_path)
    (tmp_path / "pack-1" / "00002.safetensors").unlink()
    found, seen = both(tmp_path)
    assert seen[0] + seen[1] == [2]
    assert same(found[0], found[1])


def test_a_mistake_of_any_is_raised_in_all_at_its_turn(tmp_path: Path) -> None:
    def refuse(number: int) -> Parcel:
        if number == 3:
            raise QcError("three is bad", fix="leave it out", site="layer.3", line="r.yaml:2:3")
        return Parcel(said=number)

    said: list[Any] = [None, None]

    def run(rank: int) -> None:
        got = []
        with sharing(Share(tmp_path, rank, 2)):
            try:
                for number, _ in divided("pack", refuse, [(n, 1) for n in range(6)], 1):
                    got.append(number)
            except QcError as error:
                said[rank] = (got, str(error))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    text = "three is bad\n  site   layer.3\n  recipe r.yaml:2:3\n  fix    leave it out"
    assert said == [([0, 1, 2], text)] * 2


def test_a_mistake_of_an_earlier_compile_is_forgotten(tmp_path: Path) -> None:
    def refuse(number: int) -> Parcel:
        raise QcError("no", fix="none")

    with sharing(Share(tmp_path, 0, 2)), pytest.raises(QcError, match="no"):
        list(divided("pack", refuse, [(0, 1)], 1))
    with sharing(Share(tmp_path, 0, 2)):
        assert [p.said for _, p in divided("pack", lambda n: Parcel(said=n), [(0, 1)], 1)] == [0]


def test_waiting_ends_when_there_is_nothing_to_wait_for(tmp_path: Path) -> None:
    def watch() -> None:
        raise Overtaken

    with sharing(Share(tmp_path, 1, 2, watch)), pytest.raises(Overtaken):
        list(divided("pack", lambda n: Parcel(said=n), [(0, 1), (1, 1)], 1))


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "pack-0").write_text("a file")
    with sharing(Share(tmp_path, 0, 2)), pytest.raises(QcError) as caught:
        list(divided("pack", lambda n: Parcel(said=n), [(0, 1)], 1))
    assert str(caught.value) == (
        f"cannot write to {tmp_path / 'pack-0'}: File exists\n  fix    free some space, or check the permissions"
    )
