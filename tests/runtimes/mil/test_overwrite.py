"""A state is changed where it lies, and nobody can tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtimes.mil import Interpreter
from tests.runtimes.mil.building import FP16, INT32, function, mb, save, state

INPUTS = {"x": mb.TensorSpec((1, 4), FP16), "position": mb.TensorSpec((1,), INT32), "s": state(3, 4)}


def _update(value: Any, x: Any, position: Any) -> Any:
    """Row ``position`` of a value becomes x."""
    begin = mb.concat(values=[position, np.zeros(1, np.int32)], axis=0)
    end = mb.concat(values=[mb.add(x=position, y=np.ones(1, np.int32)), np.full(1, 4, np.int32)], axis=0)
    return mb.slice_update(x=value, update=x, begin=begin, end=end)


def _plain(x: Any, position: Any, s: Any) -> Any:
    after = mb.coreml_update_state(state=s, value=_update(mb.read_state(input=s), x, position))
    return mb.mul(x=after, y=np.float16(1))


def _twice(x: Any, position: Any, s: Any) -> Any:
    """Two updates of one state, as a chunk with two attentions makes them."""
    first = mb.coreml_update_state(state=s, value=_update(mb.read_state(input=s), x, position))
    seen = mb.reduce_sum(x=first, axes=[0, 1], keep_dims=True)
    second = mb.coreml_update_state(state=s, value=_update(first, mb.add(x=x, y=seen), np.array([2], np.int32)))
    return mb.mul(x=second, y=np.float16(1))


def _old_read(x: Any, position: Any, s: Any) -> Any:
    """What was read before the update goes on being what it was."""
    before = mb.read_state(input=s)
    mb.coreml_update_state(state=s, value=_update(before, x, position))
    return mb.mul(x=before, y=np.float16(1))


def _old_view(x: Any, position: Any, s: Any) -> Any:
    """So does a part of it."""
    before = mb.read_state(input=s)
    row = mb.slice_by_index(x=before, begin=[0, 0], end=[1, 4])
    mb.coreml_update_state(state=s, value=_update(before, x, position))
    return mb.mul(x=row, y=np.float16(1))


def _shifted(x: Any, position: Any, s: Any) -> Any:
    """A part of a value is written into another part of it."""
    first = mb.coreml_update_state(state=s, value=_update(mb.read_state(input=s), x, position))
    rows = mb.slice_by_index(x=first, begin=[0, 0], end=[2, 4])
    moved = mb.slice_update(x=first, update=rows, begin=[1, 0], end=[3, 4])
    return mb.mul(x=mb.coreml_update_state(state=s, value=moved), y=np.float16(1))


def _never_written(x: Any, position: Any, s: Any) -> Any:
    return mb.mul(x=_update(mb.read_state(input=s), x, position), y=np.float16(1))


def _returned(x: Any, position: Any, s: Any) -> Any:
    return mb.coreml_update_state(state=s, value=_update(mb.read_state(input=s), x, position))


BODIES = (_plain, _twice, _old_read, _old_view, _shifted, _never_written, _returned)
IN_PLACE = {"plain", "twice"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = {body.__name__.strip("_"): function(INPUTS, body) for body in BODIES}
    return save(tmp_path_factory.mktemp("overwrite") / "s.mlpackage", made)


def _expected(name: str, held: torch.Tensor, x: torch.Tensor, position: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The result of one call, and what the state holds then."""
    after = held.clone()
    after[position] = x[0]
    if name == "shifted":
        after[1:] = after[:2].clone()
    if name == "twice":
        after[2] = x[0] + after.sum()
    results = {"old_read": held, "old_view": held[:1]}
    return results.get(name, after), held if name == "never_written" else after


@pytest.mark.parametrize("name", [body.__name__.strip("_") for body in BODIES])
def test_calls_one_after_the_other_give_what_copies_would_give(name: str, folder: Path) -> None:
    read = Interpreter(folder)
    cells, held, given = read.state(name), torch.zeros(3, 4), []
    for call in range(4):
        x = torch.full((1, 4), float(call + 1))
        found = next(iter(read.run({"x": x, "position": torch.tensor([call % 2])}, cells, function=name).values()))
        wanted, held = _expected(name, held, x, call % 2)
        given.append((found, wanted))
        assert torch.equal(cells["s"].value, held), call
    for call, (found, wanted) in enumerate(given):  # nothing that was given has been written over since
        assert torch.equal(found, wanted), call


@pytest.mark.parametrize("name", [body.__name__.strip("_") for body in BODIES])
def test_memory_is_made_once_where_nobody_looks_at_what_was(name: str, folder: Path) -> None:
    read = Interpreter(folder)
    cells, seen = read.state(name), set()
    for call in range(4):
        read.run({"x": torch.ones(1, 4), "position": torch.tensor([call % 2])}, cells, function=name)
        seen.add(cells["s"].value.data_ptr())
        keep = cells["s"].value  # so that its memory is not given out again
        assert keep is not None
    in_place = [step.overwrites for step in read.plan(name).steps if step.operation.type == "slice_update"]
    assert (len(seen) == 1) is (name in IN_PLACE or name == "never_written")
    assert in_place[-1] == (None if name in ("never_written", "old_read") else "s")
