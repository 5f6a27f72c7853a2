"""A model that answers prompts: loaded once, with a cache, its text streamed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from graph.artifact import load, load_tokenizer
from graph.errors import QcError
from qc.runs import find_artifact
from runtimes.coreml.meta import is_export
from runtimes.generate import Generator, ends
from runtimes.sampling import Sampling


class Speaker:
    """A model, ready to generate."""

    def __init__(self, generator: Generator, sampling: Sampling, chat: bool):
        self.generator, self.sampling, self.chat = generator, sampling, chat

    def say(self, prompt: str, *, stream: bool) -> dict[str, Any]:
        """Go on from ``prompt``; with ``stream``, print the text as it comes."""

        def show(row: int, piece: str) -> None:
            sys.stdout.write(piece)
            sys.stdout.flush()

        found = self.generator([prompt], self.sampling, chat=self.chat, stream=show if stream else None)
        row = found.rows[0]
        told = {"prompt": prompt, "text": row.text, "tokens": len(row.ids), "finish": row.finish}
        return told | {"tokens_per_second": round(found.tokens_per_second, 1), "uncached": found.uncached}


def open_speaker(given: str | None, runs: Path, mode: str | None, sampling: Sampling, chat: bool) -> Speaker:
    """A speaker of an artifact or a run, or of an export for the Neural Engine, which computes in ``mode``."""
    export = _export(given)
    if export is not None:
        return Speaker(_of_export(export, mode or "fp32"), sampling, chat)
    if mode is not None:
        raise QcError(f"--mode {mode} belongs to an export for the Neural Engine", fix="take --mode out")
    artifact = load(find_artifact(given, runs))
    graph, tokenizer = artifact.graph.materialize(), artifact.load_tokenizer()
    generator = Generator(graph, tokenizer, eos=ends(graph.config, tokenizer, artifact.tokenizer))
    return Speaker(generator, sampling, chat)


def _export(given: str | None) -> Path | None:
    """The export folder that is meant, if it is one: it, or a package in it."""
    if given is None:
        return None
    folder = Path(given)
    folder = folder.parent if folder.suffix == ".mlpackage" else folder
    return folder if is_export(folder) else None


def _of_export(folder: Path, mode: str) -> Generator:
    from runtimes.coreml.decoder import Decoder

    decoder = Decoder(folder, mode)
    tokenizer = load_tokenizer(folder, f"the export {folder}")
    return Generator(decoder, tokenizer, eos=ends({"eos_token_id": decoder.meta.eos}, tokenizer, folder))
