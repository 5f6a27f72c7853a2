"""The fenced blocks of a document, and how what a command printed is compared with what the document shows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
FENCE = re.compile(r"```(\w*)")
LOOSE = re.compile(
    r"(?P<key>\b[0-9a-f]{12}\b)"  # the key of a run
    r"|(?P<figure>-?\b\d[\d,]*\.\d+(?:e[+-]\d+)?\b|\binf\b)"  # a figure that was measured
    r"|(?P<speed>\b[\d,]+(?= tokens/s))"
    r"|(?P<gap>…)"
    r"|(?P<space> {2,}|-{3,})"  # columns are as wide as their widest cell
)
PATTERNS = {
    "key": "[0-9a-f]{12}",
    "figure": r"(?:-?[\d,]+(?:\.\d+)?(?:e[+-]?\d+)?|inf)",
    "speed": r"[\d,.]+",
    "gap": ".*",
    "space": "[ -]+",
}


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    kind: str
    lines: tuple[str, ...]
    place: str
    """``docs/tutorial.md:12``."""

    @property
    def file(self) -> str | None:
        """The file it says it is, in a comment on its first line."""
        found = re.fullmatch(r"# ([\w./-]+\.\w+)", self.lines[0]) if self.lines else None
        return found[1] if found else None

    @property
    def text(self) -> str:
        """Its content."""
        return "\n".join(self.lines) + "\n"

    def commands(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Of a console block: each command, and the lines shown below it."""
        command, shown = "", list[str]()
        for line in self.lines:
            if line.startswith("$ "):
                if command:
                    yield command, tuple(shown)
                command, shown = line.removeprefix("$ "), []
            elif command.endswith("\\") or _open_document(command):
                command += f"\n{line}"
            else:
                shown.append(line)
        yield command, tuple(shown)


def _open_document(command: str) -> bool:
    """Whether a ``<< END`` in the command has not met its END."""
    found = re.search(r"<<\s*'?(\w+)'?", command)
    return found is not None and not command.endswith(f"\n{found[1]}")


def blocks(document: str) -> list[Block]:
    """The fenced blocks of a file, named from the repository's root."""
    found: list[Block] = []
    kind, lines, start = "", list[str](), 0
    for number, line in enumerate((ROOT / document).read_text(encoding="utf-8").splitlines(), 1):
        if start and line.strip() == "```":
            found.append(Block(kind, tuple(lines), f"{document}:{start}"))
            start = 0
        elif start:
            lines.append(line)
        elif match := FENCE.fullmatch(line.strip()):
            kind, lines, start = match[1], [], number
    assert not start, f"{document}:{start} is not closed"
    return found


def shown_in(shown: Sequence[str], printed: str) -> str | None:
    """The first line of ``shown`` that ``printed`` lacks; None if all are there, in order, with nothing in between.

    Figures with a decimal point, keys of runs, speeds and the widths of columns may differ. ``…`` stands for
    anything within a line, and ``...`` alone for any lines.
    """
    left = [line.rstrip() for line in printed.splitlines()]
    free = False
    for line in shown:
        if line.strip() == "...":
            free = True
            continue
        at = next((i for i, one in enumerate(left) if alike(line.rstrip(), one)), None)
        if at is None or (at and not free):
            return line
        left, free = left[at + 1 :], False
    return None if free or not any(left) else f"the end; {left[0]!r} follows"


def alike(shown: str, printed: str) -> bool:
    """Whether two lines are the same, but for what may differ."""
    pattern, at = "", 0
    for match in LOOSE.finditer(shown):
        assert match.lastgroup
        pattern += re.escape(shown[at : match.start()]) + PATTERNS[match.lastgroup]
        at = match.end()
    return re.fullmatch(pattern + re.escape(shown[at:]), printed) is not None
