"""Run ``qc`` or a few lines of Python in a process of their own, without the seconds that importing torch takes.

A server process imports the libraries once and forks itself for every call: the process that comes out of it has an
argv, a folder, an environment, streams and an exit code of its own, and has run nothing of qc before.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

import pytest

LIBRARIES = [
    "torch.export",
    "torch._dynamo",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.qwen3.modeling_qwen3",
    "bitsandbytes",
    "accelerate",
    "ruamel.yaml",
    "pydantic",
]
_CONTEXT = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Done:
    """What came of a process."""

    code: int
    out: str
    err: str
    both: str
    """stdout and stderr as a terminal shows them; then ``out`` and ``err`` are empty."""


def qc(
    *argv: str,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    stdin: str = "",
    path: Sequence[Path] = (),
    as_seen: bool = False,
) -> Done:
    """``qc ARGV…`` in the folder ``cwd``; folders in ``path`` hold further packages."""
    return _run(_qc, argv, cwd, env or {}, stdin, path, as_seen)


def python(code: str, *, cwd: Path, path: Sequence[Path] = ()) -> Done:
    """``python -c CODE`` in the folder ``cwd``."""
    return _run(_python, (code,), cwd, {}, "", path, True)


def answer(done: Done) -> Any:
    """The JSON on stdout of a command that did what it should; nothing else may stand there."""
    assert done.code == 0, done.err
    return json.loads(done.out)


def killed(*argv: str, cwd: Path, sign: str, delay: float) -> bool:
    """Start ``qc ARGV…``, and SIGKILL it ``delay`` seconds after a path of the glob ``sign`` that was not there appears.

    False if it ended by itself before.
    """
    _start_server()
    old = set(cwd.glob(sign))
    with tempfile.TemporaryDirectory() as temporary:
        files = [str(Path(temporary, name)) for name in ("out", "err")]
        process = _CONTEXT.Process(target=_child, args=(_qc, argv, cwd, {}, "", [], files))
        process.start()
        while process.exitcode is None and not set(cwd.glob(sign)) - old:
            time.sleep(0.001)
        time.sleep(delay)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), Path(files[1]).read_text()
        return process.exitcode != 0


def _run(
    main: Callable[..., None],
    argv: Sequence[str],
    cwd: Path,
    env: Mapping[str, str],
    stdin: str,
    path: Sequence[Path],
    as_seen: bool,
) -> Done:
    _start_server()
    with tempfile.TemporaryDirectory() as temporary:
        files = [Path(temporary, name) for name in (("both",) * 2 if as_seen else ("out", "err"))]
        process = _CONTEXT.Process(
            target=_child, args=(main, argv, cwd, dict(env), stdin, [str(p) for p in path], [str(f) for f in files])
        )
        process.start()
        process.join(300)
        if process.exitcode is None:
            process.kill()
            process.join()
            pytest.fail(f"qc {' '.join(argv)} has not ended after 5 minutes:\n{files[1].read_text()}")
        out, err = (file.read_text() for file in files)
        return Done(process.exitcode, *(("", "", out) if as_seen else (out, err, "")))


def _start_server() -> None:
    """Start the server, if it does not run yet, in the environment that tests are to have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("COLUMNS", "80")
        _CONTEXT.set_forkserver_preload(LIBRARIES)
        ensure_running()


def _child(
    main: Callable[..., None],
    argv: Sequence[str],
    cwd: Path,
    env: dict[str, str],
    stdin: str,
    path: list[str],
    files: list[str],
) -> None:
    """What the forked process does."""
    for number, file in enumerate(files, 1):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, encoding="utf-8") for number in (1, 2))
    sys.stdin = io.StringIO(stdin)
    os.chdir(cwd)
    os.environ.update(env)
    sys.path[:0] = path
    main(*argv)


def _qc(*argv: str) -> None:
    from qc.cli import main

    sys.argv = ["qc", *argv]
    main()


def _python(code: str) -> None:
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, "<documentation>", "exec"), scope)
