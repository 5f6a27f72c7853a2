"""The reader that an ONNX model is verified with: a process of its own, which knows the saved files and not the graph.

``python -m runtimes.verify.onnx_worker FOLDER INPUTS OUTPUTS`` checks the model by the letter of ONNX, runs it on the
tokens and masks of INPUTS, each in one go or in pieces, and writes what comes out, and what else it found, to OUTPUTS.
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
    from runtimes.onnx.session import Session

    with safe_open(inputs, framework="pt") as file:
        asked = json.loads(file.metadata()["asked"])
    given = load_file(inputs)
    try:
        tokens = _tokens(Path(folder))
        _check(Path(folder))
        session = Session(Path(folder))
        found = {f"out_{i}": _read(session, given, i, pieces) for i, pieces in enumerate(asked["pieces"])}
        if asked["loose"]:
            loose = Session(Path(folder), exact=False)
            found |= {f"loose_{i}": _read(loose, given, i, pieces) for i, pieces in enumerate(asked["pieces"])}
    except QcError as error:
        sys.exit(f"{error.what} ({error.fix})")
    facts = {"tokenizer": tokens, "outputs": session.outputs}
    save_file(found, outputs, metadata={"facts": json.dumps(facts)})


def _check(folder: Path) -> None:
    """Every node, by the definitions of its op."""
    from runtimes.onnx.file import MODEL, onnx

    library = onnx()
    try:
        library.checker.check_model(str(folder / MODEL))
    except library.checker.ValidationError as error:
        sys.exit(f"it is no ONNX model: {str(error).strip().splitlines()[0]}")


def _read(session: Any, given: dict[str, Tensor], number: int, pieces: list[int]) -> Tensor:
    """The first output of a probe, [B, T, d] in fp32; the keys and values of a piece are the past of the next."""
    import torch

    ids, mask = given[f"ids_{number}"], given[f"mask_{number}"]
    past: dict[str, Tensor] = {}
    results, at = [], 0
    for piece in pieces:
        tokens = {"input_ids": ids[:, at : at + piece], "attention_mask": mask[:, : at + piece]}
        found = session.run({**tokens, **past})
        past = {name: found[name.replace("past_key_values.", "present.")] for name in session.past}
        results.append(found[session.outputs[0]].float())
        at += piece
    return torch.cat(results, dim=1).contiguous()


def _tokens(folder: Path) -> list[list[int]] | None:
    """The tokens of the probe texts; None where there is no tokenizer."""
    from graph.tokenizer import has_tokenizer, load_tokenizer

    if not has_tokenizer(folder):
        return None
    tokenizer = load_tokenizer(folder, "the export")
    return [list(tokenizer(text)["input_ids"]) for text in PROBE_TEXTS]


if __name__ == "__main__":
    main(*sys.argv[1:])
