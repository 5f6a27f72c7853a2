"""Check the code: one line a check, and the whole output of those that fail.

python tools/check.py [--fix] [--no-tests] [--only NAME]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable  # each tool runs in this interpreter's environment

CHECKS = {
    "format": [PYTHON, "-m", "ruff", "format", "--check", "."],
    "lint": [PYTHON, "-m", "ruff", "check", "."],
    "types": [PYTHON, "-m", "mypy"],
    "layers": [PYTHON, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-logo"],
    "tests": [PYTHON, "-m", "pytest", "-q", "-n", "2", "-m", "not slow and not gpu"],
}

FIXES = [
    [PYTHON, "-m", "ruff", "check", "--fix-only", "--quiet", "."],
    [PYTHON, "-m", "ruff", "format", "--quiet", "."],
]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks that were asked for; 1 if one of them failed."""
    parser = argparse.ArgumentParser(description="Check the code: one line a check.")
    parser.add_argument("--fix", action="store_true", help="let ruff repair what it can, then check")
    parser.add_argument("--no-tests", action="store_true", help="leave the tests out")
    parser.add_argument("--only", action="append", choices=CHECKS, help="this check alone; may be repeated")
    asked = parser.parse_args(argv)

    if asked.fix:
        for command in FIXES:
            subprocess.run(command, cwd=ROOT, check=False)
    names = [name for name in asked.only or CHECKS if not (asked.no_tests and name == "tests")]
    failed = [name for name in names if not passes(name, CHECKS[name])]
    return 1 if failed else 0


def passes(name: str, command: Sequence[str]) -> bool:
    """Run one check and print its line; the output too, if it failed."""
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    verdict = "FAILED" if done.returncode else "OK"
    print(f"{name:<8}{verdict:<8}{time.monotonic() - start:5.1f} s", flush=True)
    if done.returncode:
        print(done.stdout, flush=True)
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
