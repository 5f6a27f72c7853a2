"""What a thread does behind a file that is being written: send it to the disk."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO

FLUSH = 1 << 28
"""Bytes after which what was written is sent to the disk, which has nothing else to do until then."""


class Flushed:
    """A file that is sent to the disk by a thread while more of it is written."""

    def __init__(self, file: BinaryIO, pool: ThreadPoolExecutor):
        self.file, self.pool, self.written = file, pool, 0
        self.last: Future[Any] = pool.submit(int)

    def write(self, data: Any) -> None:
        """Write ``data``; raises what came of sending on what was written before."""
        self.written += self.file.write(data)
        if self.written >= FLUSH and self.last.done():
            self.last.result()
            self.file.flush()
            self.last, self.written = self.pool.submit(os.fsync, self.file.fileno()), 0

    def close(self) -> None:
        """Once all of it is on the disk."""
        self.file.flush()
        self.last.result()
        os.fsync(self.file.fileno())
