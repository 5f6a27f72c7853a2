"""How fast the interpreter runs an export, in time of the processor: to load, for a token of a prompt, for one decoded.

``python -m tools.bench.interpreter EXPORT``; without an export, the seedling is exported first.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from runtimes.coreml.decoder import Decoder, Session
from runtimes.mil import MODES

_TOKENS = 32


def main(given: str | None) -> None:
    """Print a row a mode."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(given) if given else _seedling(Path(temporary))
        print(f"{'mode':<6}{'load s':>8}{'prompt ms/token':>18}{'decode ms':>11}{'tokens/s':>10}{'ops':>6}")
        for mode in MODES:
            print(_row(folder, mode))


def _seedling(folder: Path) -> Path:
    from graph import capture
    from graph.checkpoint import locate
    from runtimes.export.ane import export

    export(capture("seedling"), folder / "seedling", source=locate("seedling"))
    return folder / "seedling"


def _row(folder: Path, mode: str) -> str:
    start = time.process_time()
    decoder = Decoder(folder, mode)
    steps = [len(part.package.plan(name).steps) for part in decoder.parts for name in part.part.functions]
    loaded = time.process_time() - start
    prompt = list(range(1, 1 + max(1, decoder.meta.prefill)))
    Session(decoder).read(prompt)
    session, start = Session(decoder), time.process_time()
    session.read(prompt)
    read = time.process_time() - start
    start = time.process_time()
    for token in range(_TOKENS):
        session.read([token])
    each = (time.process_time() - start) / _TOKENS
    prompt_ms = 1000 * read / len(prompt)
    return f"{mode:<6}{loaded:>8.2f}{prompt_ms:>18.2f}{1000 * each:>11.1f}{1 / each:>10.1f}{sum(steps):>6}"


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
