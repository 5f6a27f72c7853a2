"""What the commands say, and how they end: text for people, ``--json`` for scripts, exit codes that mean something."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from graph.errors import QcError, QcErrors

OK, USER, GATE, VERIFY = 0, 1, 3, 4
"""Exit codes: done; a mistake to fix; a gate failed; an export disagrees with its graph. 2 is a wrong call."""


class GateFailed(QcError):
    """A ``require:`` of the recipe does not hold."""


class VerificationFailed(QcError):
    """An export does not compute what its graph computes."""


def quiet() -> bool:
    """Whether this process is not the first of several: then it says nothing."""
    return int(os.environ.get("RANK", "0")) > 0


def tell(message: str) -> None:
    """Say something on the way; on stderr, so that stdout holds the result alone."""
    if not quiet():
        print(message, file=sys.stderr, flush=True)


def result(data: Any, as_json: bool, text: Callable[[], str]) -> None:
    """The result of a command, on stdout."""
    if not quiet():
        print(json.dumps(data, indent=1, default=str) if as_json else text(), flush=True)


@contextmanager
def explained(as_json: bool = False) -> Iterator[None]:
    """Turn a QcError into its text and an exit code, never a traceback."""
    try:
        yield
    except QcError as error:
        found = error.errors if isinstance(error, QcErrors) else (error,)
        if as_json:
            print(json.dumps({"errors": [e.as_dict() for e in found]}, indent=1), flush=True)
        else:
            print("\n\n".join(f"error: {e}" for e in found), file=sys.stderr, flush=True)
        code = GATE if isinstance(error, GateFailed) else VERIFY if isinstance(error, VerificationFailed) else USER
        raise SystemExit(code) from None
    except BrokenPipeError:
        sys.stderr.close()
        raise SystemExit(USER) from None
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to go on", file=sys.stderr)
        raise SystemExit(130) from None


def table(rows: Sequence[Sequence[str]], head: Sequence[str]) -> str:
    """Rows in aligned columns under a head; numbers to the right."""
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    right = [all(_numeric(r[i]) for r in rows) and bool(rows) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        return "  ".join(cells).rstrip()

    return "\n".join([line(head), "  ".join("-" * w for w in widths), *(line(r) for r in rows)])


def _numeric(cell: str) -> bool:
    return not cell or cell[0].isdigit() or cell in ("-", "inf", "nan") or (cell[0] == "-" and cell[1:2].isdigit())


def size(count: float) -> str:
    """Bytes as people read them: ``9.8 MB`` (powers of 10)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("no unit")
