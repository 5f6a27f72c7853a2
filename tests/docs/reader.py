"""Somebody who types in what a document says, block by block, and compares what comes of it."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.docs.blocks import Block, shown_in
from tests.qc.command import Done, python, qc


@dataclass
class Reader:
    """Somebody who types everything in."""

    folder: Path
    installed: Path
    """Where ``pip install`` goes, so that the environment of the tests stays as it is."""

    code: int = 0
    """What the last command ended with."""

    def read(self, all_blocks: Sequence[Block]) -> None:
        """Do what each block says, and compare what comes of it with what the document shows."""
        printed = ""
        for block in all_blocks:
            if block.kind == "console":
                for command, shown in block.commands():
                    self.type(command, shown, block.place)
            elif block.kind == "text":
                expect(block.lines, printed, block.place)
            elif block.file:
                target = self.folder / block.file
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(block.text, encoding="utf-8")
            elif block.kind == "python":
                done = python(block.text, cwd=self.folder, path=[self.installed])
                assert done.code == 0, f"{block.place} ends with {done.code}:\n{done.both}"
                printed = done.both
            else:
                pytest.fail(f"{block.place}: nobody knows what to do with a block of {block.kind!r}")
        assert self.code == 0, "the document shows no exit code of its last command"

    def type(self, command: str, shown: tuple[str, ...], place: str) -> None:
        """Run one command. It must succeed, unless the next one is ``echo $?``."""
        if command == "echo $?":
            assert shown == (str(self.code),), f"{place}: the command above ends with {self.code}"
            self.code = 0
            return
        assert self.code == 0, f"{place}: the command above {command!r} ends with {self.code}"
        done = self.run(command)
        self.code = done.code
        expect(shown, done.both, f"{place}: {command}")

    def run(self, command: str) -> Done:
        """Run it as a shell would."""
        first, _, rest = command.partition(" | ")
        name, *argv = shlex.split(first.replace("\\\n", " "), comments=True)
        if name == "pip":
            return self.shell(f"{sys.executable} -m {_into(argv, self.installed)}")
        if name != "qc":
            return self.shell(command)
        done = qc(*self.expanded(argv), cwd=self.folder, path=[self.installed], as_seen=not rest)
        return self.shell(rest, done.out) if rest else done

    def expanded(self, words: list[str]) -> Iterator[str]:
        """Globs as the files that they match, as a shell has it."""
        for word in words:
            found = sorted(self.folder.glob(word)) if "*" in word else []
            yield from (str(path.relative_to(self.folder)) for path in found) if found else [word]

    def shell(self, command: str, stdin: str = "") -> Done:
        """Run it in a shell."""
        done = subprocess.run(
            command, shell=True, cwd=self.folder, input=stdin, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )  # fmt: skip
        return Done(done.returncode, "", "", done.stdout)


def _into(argv: list[str], folder: Path) -> str:
    """``pip install -e ./x`` as a command that installs into ``folder`` and fetches nothing."""
    what = [word for word in argv[1:] if word != "-e"]
    options = ["-q", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--target", str(folder)]
    return shlex.join(["pip", argv[0], *options, *what])


def expect(shown: tuple[str, ...], printed: str, place: str) -> None:
    missing = shown_in(shown, printed) if shown else None
    assert missing is None, f"{place}\nhas, where the document shows: {missing}\n\n{printed}"
