"""Compiling in several processes: who this one is, the helpers that a command starts, and how each knows of the others.

``qc compile --processes 4`` starts three helpers beside itself; under ``accelerate launch`` the processes are there
already. All go through the same passes and divide the work on weights (``graph.apart``); the first alone tells,
measures and writes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO

from graph.apart import POLL, Overtaken, Share, sharing
from graph.errors import QcError

Watch = Callable[[], None]
"""Called while waiting for another process; raises where that is in vain."""


@dataclass(frozen=True)
class Part:
    """What a helper has to know."""

    run: str
    stage: str
    parent: str | None
    check: bool


@contextmanager
def together(processes: int, part: Part, artifact: Path, parts: Path) -> Iterator[bool]:
    """Inside, work on weights is divided, and what comes of it lies in ``parts``; whether this process is to write.

    Where it is not, ``artifact`` is there in the end.
    """
    rank, count = launched()
    if rank > 0:
        with suppress(Overtaken), sharing(Share(parts, rank, count, partial(_overtaken, artifact))):
            yield False
        while not _is_there(artifact):
            time.sleep(POLL)
        return
    if count > 1:
        with sharing(Share(parts, 0, count)):
            yield True
    elif processes > 1:
        with helpers(processes - 1, part) as found, sharing(Share(parts, 0, processes, found.watch)):
            yield True
    else:
        yield True
        return
    shutil.rmtree(parts, ignore_errors=True)


def parts_of(index: Path) -> Path:
    """Where processes put what they made for the artifact of this entry in the index of all that was compiled."""
    return index.with_suffix(".parts")


def _is_there(artifact: Path) -> bool:
    return (artifact / "manifest.json").is_file()


def _overtaken(artifact: Path) -> None:
    if _is_there(artifact):
        raise Overtaken


class Helpers:
    """Processes that were started to help this one, each with the file of what it says."""

    def __init__(self, started: Sequence[tuple[subprocess.Popen[bytes], IO[bytes]]]) -> None:
        self.started = started

    def watch(self) -> None:
        """Raise if one of them has ended and left its part undone."""
        for process, said in self.started:
            code = process.poll()
            if code:
                why = f"was killed by signal {-code}" if code < 0 else _last_line(said)
                raise QcError(
                    f"a helping process has ended: {why}",
                    fix="run the same command again, which goes on, with fewer --processes if memory is short",
                )

    def stop(self) -> None:
        """End those that still run."""
        for process, _ in self.started:
            if process.poll() is None:
                process.terminate()
        for process, said in self.started:
            process.wait()
            said.close()


@contextmanager
def helpers(count: int, part: Part) -> Iterator[Helpers]:
    """Start ``count`` processes that help with ``part``; they end with the block."""
    import torch

    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)  # a checkout that is not installed, a plugin beside it
    command = [sys.executable, "-m", "qc.together", json.dumps(asdict(part))]
    started = []
    for rank in range(1, count + 1):
        said = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop()
        argv = [*command, str(rank), str(count + 1)]
        process = subprocess.Popen(argv, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        started.append((process, said))
    found = Helpers(started)
    try:
        yield found
    finally:
        found.stop()


def launched() -> tuple[int, int]:
    """The number of this process and how many there are, as ``accelerate launch`` or ``torchrun`` say it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def watch_parent() -> Watch:
    """A watch that ends a helper whose parent is gone."""
    parent = os.getppid()

    def watch() -> None:
        if os.getppid() != parent:
            raise QcError("the process that this one helps has ended", fix="run its command again")

    return watch


def _last_line(said: IO[bytes]) -> str:
    said.seek(0)
    lines = [line for line in said.read().decode(errors="replace").splitlines() if line.strip()]
    first = next((line for line in lines if line.startswith("error: ")), None)
    return (first or (lines[-1] if lines else "it said nothing")).removeprefix("error: ")


def main() -> None:
    """``python -m qc.together PART RANK COUNT``: help to compile a stage, and write nothing of the artifact."""
    from qc.compiling import help_stage
    from qc.console import explained

    part, rank, count = sys.argv[1:]
    with explained():
        help_stage(Part(**json.loads(part)), int(rank), int(count), watch_parent())


if __name__ == "__main__":
    main()
