"""Work on weights divided among processes that compile the same recipe, each of which ends with all of it.

Every process goes through all passes and works on its own share of the weights; what comes of one lies in a file that
the others read. So all of them hold the same graph in the end, the bytes that one process alone would have made, and
a compile that was stopped goes on from the files that are there.

    FOLDER/pack-0/00007.safetensors    what came of the eighth item of the first work called ``pack``

Processes need no connection but the folder: they may be on several machines that share it.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from graph.errors import QcError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")

MISTAKE = ".mistake"
"""What the file of an item ends in that cannot be worked on."""

POLL = 0.01
"""Seconds between two looks for what another process makes."""


class Parcel(NamedTuple):
    """What comes of an item, in a form that can be sent."""

    tensors: dict[str, Tensor] = {}
    """The order of the keys is kept."""

    said: Any = None
    """Numbers, texts, lists and maps, as JSON has them."""

    def on(self, device: torch.device) -> dict[str, Tensor]:
        """The tensors on a device; those of a plan have no place."""
        return {key: value if value.is_meta else value.to(device) for key, value in self.tensors.items()}


class Overtaken(Exception):
    """Another process has finished what this one has a share in."""


@dataclass
class Share:
    """The part that this process takes."""

    folder: Path
    """Where all processes put what they made."""

    rank: int
    count: int
    watch: Callable[[], None] = lambda: None
    """Called while waiting; raises where there is nothing to wait for."""

    began: float = field(default_factory=time.time)
    calls: Counter[str] = field(default_factory=Counter)
    """How often work of each name was divided so far."""


_SHARE: ContextVar[Share | None] = ContextVar("share", default=None)


@contextmanager
def sharing(share: Share) -> Iterator[None]:
    """Inside, work is divided."""
    token = _SHARE.set(share)
    try:
        yield
    finally:
        _SHARE.reset(token)


def divided(
    name: str, work: Callable[[T], Parcel], items: Iterable[tuple[T, int]], threads: int | None = None
) -> Iterator[tuple[T, Parcel]]:
    """Every item and what ``work`` makes of it, in order; an item comes with how much work it is.

    All processes must ask for the same. ``work`` is called for the items of this process alone, so it should read what
    is large by itself. A QcError of any process is raised in all, at its item's turn.
    """
    from graph.formats.ahead import worked_ahead

    share = _SHARE.get()
    if share is None:
        yield from worked_ahead(lambda item: (item, work(item)), (item for item, _ in items), threads)
        return
    folder = share.folder / f"{name}-{share.calls[name]}"
    share.calls[name] += 1
    listed = [(item, load, folder / f"{number:05}.safetensors") for number, (item, load) in enumerate(items)]
    own = [(item, path) for item, path in _own(listed, share) if not path.is_file()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        deque(worked_ahead(lambda one: _put(one[1], work, one[0]), own, threads), maxlen=0)
    except OSError as error:
        what = f"cannot write to {folder}: {error.strerror}"
        raise QcError(what, fix="free some space, or check the permissions") from None
    for item, _, path in listed:
        yield item, _get(path, share)


def _own(listed: list[tuple[T, int, Path]], share: Share) -> Iterator[tuple[T, Path]]:
    """The items of this process: each goes to whoever has the least to do so far."""
    loads = [0] * share.count
    for item, load, path in listed:
        owner = loads.index(min(loads))
        loads[owner] += load
        if owner == share.rank:
            yield item, path


def _put(path: Path, work: Callable[[T], Parcel], item: T) -> None:
    """Write what comes of an item, or the mistake that is found in it; the file appears whole."""
    from safetensors.torch import save

    try:
        tensors, said = work(item)
    except QcError as error:
        written = json.dumps([error.what, error.fix, error.site, error.line]).encode()
        _appear(path.with_suffix(MISTAKE), written)
        return
    about = {"order": json.dumps(list(tensors)), "said": json.dumps(said)}
    held = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    _appear(path, save(held, about))


def _appear(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _get(path: Path, share: Share) -> Parcel:
    """Read what came of an item, once it is there."""
    from safetensors import safe_open

    while True:
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata()
                tensors = {key: file.get_tensor(key) for key in json.loads(about["order"])}
                return Parcel(tensors, json.loads(about["said"]))
        except FileNotFoundError:
            _raise_mistake(path.with_suffix(MISTAKE), share.began)
            share.watch()
            time.sleep(POLL)


def _raise_mistake(path: Path, began: float) -> None:
    """The mistake that a process found in an item; one of an earlier compile may have been mended since."""
    try:
        if path.stat().st_mtime < began:
            return
        what, fix, site, line = json.loads(path.read_bytes())
    except FileNotFoundError:
        return
    raise QcError(what, fix=fix, site=site, line=line)
