"""Makes a cache, with a pause after each shard in which it can be killed: ``python -m … FOLDER``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from runtimes.settings import TextFiles
from tests.runtimes.distill.tiny import settings, write


def main(folder: Path) -> None:
    """Write the cache and say of every shard that it is there."""
    torch.set_num_threads(1)

    def tell(text: str) -> None:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
        time.sleep(0.3)

    data = TextFiles(text=str(folder / "text" / "*.txt"))
    write(folder / "killed", settings(data, negatives=4), tell=tell)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
