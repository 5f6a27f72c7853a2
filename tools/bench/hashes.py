"""How quickly files are hashed by sha256 and by BLAKE3, on one thread.

python tools/bench/hashes.py [--megabytes 512] [--rounds 3]

Random bytes that lie in the page cache, both in turns; the best of the rounds counts, and the ratio of the two.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from graph.hashes import blake3_of, sha256


def main() -> None:
    """Run and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    said = parser.parse_args()
    best = {"sha256": float("inf"), "blake3": float("inf")}
    with tempfile.NamedTemporaryFile() as file:
        for _ in range(said.megabytes):
            file.write(os.urandom(1 << 20))
        file.flush()
        for _ in range(said.rounds):
            for name, found in (("sha256", sha256), ("blake3", blake3_of)):
                start = time.perf_counter()
                found(Path(file.name))
                best[name] = min(best[name], time.perf_counter() - start)
    for name, seconds in best.items():
        print(f"{name} {said.megabytes / 1024 / seconds:6.2f} GiB/s, {best['sha256'] / seconds:5.1f}x")


if __name__ == "__main__":
    main()
