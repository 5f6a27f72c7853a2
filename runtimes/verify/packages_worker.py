"""The reader that packages are verified with: a process of its own, which knows the saved files and not the graph.

``python -m runtimes.verify.packages_worker FOLDER INPUTS OUTPUTS`` computes the rows and prompts of INPUTS in each mode
and writes what comes out, and what else it found, to OUTPUTS.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtimes.verify.findings import PROBE_TEXTS

if TYPE_CHECKING:
    from torch import Tensor


def main(folder: str, inputs: str, outputs: str) -> None:
    """Load, run, write."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    from graph.errors import QcError
    from runtimes.mil import MODES

    with safe_open(inputs, framework="pt") as file:
        asked = json.loads(file.metadata()["asked"])
    given = load_file(inputs)
    found: dict[str, Tensor] = {}
    facts: dict[str, Any] = {"infinite": {}}
    try:
        for mode in MODES:
            _run(Path(folder), mode, asked, given, found, facts)
        facts["tokenizer"] = _tokens(Path(folder))
    except QcError as error:
        sys.exit(f"{error.what} ({error.fix})")
    save_file(found, outputs, metadata={"facts": json.dumps(facts)})


def _run(
    folder: Path, mode: str, asked: dict[str, Any], given: dict[str, Tensor], found: dict[str, Tensor], facts: Any
) -> None:
    """All that is asked of one mode."""
    import torch

    from runtimes.coreml.decoder import Decoder
    from runtimes.coreml.encoder import Encoder
    from runtimes.mil import Trace
    from runtimes.verify.similarities import similarities

    decodes = asked["kind"] == "causal-lm"
    model: Any = Decoder(folder, mode) if decodes else Encoder(folder, mode)
    for number, row in enumerate(asked["rows"]):
        if mode not in row["modes"]:
            continue
        ids = given[f"row_{number}"].tolist()
        memory = {name: value for name, value in given.items() if row["memory"] and name.startswith("memory_")}
        result = _row(model, ids, row, memory) if decodes else model.hidden(ids)
        found[f"{mode}_{number}"] = result.contiguous()
        if mode not in facts["infinite"] and not bool(torch.isfinite(result).all()):
            traces = {loaded.part.file: Trace() for loaded in model.parts}
            model.traces = traces
            _row(model, ids, row, memory) if decodes else model.hidden(ids)
            model.traces = None
            facts["infinite"][mode] = _first_infinite(traces)
    sentences = [given[f"sentence_{i}"].tolist() for i in range(sum(n.startswith("sentence_") for n in given))]
    if sentences:
        found[f"{mode}_similarities"] = similarities(model.hidden, model.pool(), sentences)
    if mode == "fp32":
        functions = sum(len(loaded.part.functions) for loaded in model.parts)
        facts["packages"] = f"{len(model.parts)} packages, {functions} functions"
        if decodes:
            prompts = [given[f"prompt_{i}"].tolist() for i in range(sum(n.startswith("prompt_") for n in given))]
            found["greedy"] = torch.tensor([_greedy(model, ids, asked["tokens"]) for ids in prompts])


def _row(model: Any, ids: list[int], row: dict[str, Any], memory: dict[str, Tensor]) -> Tensor:
    """The logits behind every token of a row from ``seen`` on, which is where a piece ends, or the beginning."""
    import torch

    from runtimes.coreml.decoder import Session

    session, found, at = Session(model, memory), [], 0
    for piece in row["pieces"]:
        part = ids[at : at + piece]
        found.append(session.read(part)[None] if at < row["seen"] else session.read_all(part))
        at += piece
    return torch.cat(found)


def _greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    from runtimes.coreml.decoder import Session

    session = Session(model)
    found = [int(session.read(prompt).argmax())]
    while len(found) < count:
        found.append(int(session.read(found[-1:]).argmax()))
    return found


def _first_infinite(traces: Any) -> str:
    """The first tensor, in the order of computation, that is not finite."""
    return next(
        f"{file}: {name}" for file, trace in traces.items() for name, seen in trace.seen.items() if seen.infinite
    )


def _tokens(folder: Path) -> dict[str, Any] | None:
    """The tokens of the probe texts; None where there is no tokenizer."""
    from graph.tokenizer import has_tokenizer

    if not has_tokenizer(folder):
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return {"ids": [list(tokenizer(text)["input_ids"]) for text in PROBE_TEXTS]}


if __name__ == "__main__":
    main(*sys.argv[1:])
