"""A model that answers prompts: loaded once, with a cache, its text streamed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graph.artifact import load
from graph.errors import QcError
from graph.joint import is_joint
from graph.tokenizer import load_tokenizer
from qc.runs import find_artifact
from runtimes.context import with_context
from runtimes.coreml.meta import is_export
from runtimes.generate import Generator, ends
from runtimes.onnx.session import Decoder as OnnxDecoder
from runtimes.onnx.session import is_onnx
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


def open_speaker(
    given: str | None,
    runs: Path,
    mode: str | None,
    sampling: Sampling,
    chat: bool,
    context: Sequence[Path] = (),
) -> Speaker:
    """A speaker of an artifact or a run, or of an export: one for the Neural Engine computes in ``mode``.

    ``context`` are files that a model with an encoder may look things up in.
    """
    export = _export(given)
    if export is not None and context:
        raise QcError("an export for the Neural Engine takes no --context", fix="give the artifact it was made of")
    if export is not None:
        return Speaker(_of_export(export, mode or "fp32"), sampling, chat)
    if mode is not None:
        raise QcError(f"--mode {mode} belongs to an export for the Neural Engine", fix="take --mode out")
    if given is not None and is_onnx(Path(given)):
        if context:
            raise QcError("an ONNX export takes no --context", fix="give the artifact it was made of")
        return Speaker(_of_onnx(Path(given)), sampling, chat)
    artifact = load(find_artifact(given, runs))
    graph, tokenizer = artifact.graph.materialize(), artifact.load_tokenizer()
    model: Any = graph
    if context or is_joint(graph):
        model = with_context(graph, artifact.load_memory_tokenizer() or tokenizer, [_text(file) for file in context])
    generator = Generator(model, tokenizer, eos=ends(graph.config, tokenizer, artifact.tokenizer))
    return Speaker(generator, sampling, chat)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise QcError(f"cannot read {file}: {why}", fix="give text files to --context") from None


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


def _of_onnx(folder: Path) -> Generator:
    decoder = OnnxDecoder(folder)
    tokenizer = load_tokenizer(folder, f"the export {folder}")
    return Generator(decoder, tokenizer, eos=ends({}, tokenizer, folder))
