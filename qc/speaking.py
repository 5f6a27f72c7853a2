"""A model that answers prompts: loaded once, with a cache, its text streamed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from graph.artifact import load
from runtimes.generate import Generator, ends
from runtimes.sampling import Sampling


class Speaker:
    """An artifact, ready to generate."""

    def __init__(self, folder: Path, sampling: Sampling, chat: bool):
        artifact = load(folder)
        graph, tokenizer = artifact.graph.materialize(), artifact.load_tokenizer()
        self.generator = Generator(graph, tokenizer, eos=ends(graph, tokenizer, artifact.tokenizer))
        self.sampling, self.chat = sampling, chat

    def say(self, prompt: str, *, stream: bool) -> dict[str, Any]:
        """Go on from ``prompt``; with ``stream``, print the text as it comes."""

        def show(row: int, piece: str) -> None:
            sys.stdout.write(piece)
            sys.stdout.flush()

        found = self.generator([prompt], self.sampling, chat=self.chat, stream=show if stream else None)
        row = found.rows[0]
        told = {"prompt": prompt, "text": row.text, "tokens": len(row.ids), "finish": row.finish}
        return told | {"tokens_per_second": round(found.tokens_per_second, 1), "uncached": found.uncached}
