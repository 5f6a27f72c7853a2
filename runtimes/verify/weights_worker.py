"""The reader that an export is verified with: a process of its own, which knows transformers and not the graph.

``python -m runtimes.verify.weights_worker FOLDER INPUTS OUTPUTS`` loads the export in fp32, runs it on the probe
batches of INPUTS, and writes what comes out, and what it found of tokenizer and generation settings, to OUTPUTS.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from runtimes.verify.findings import PROBE_TEXTS


def main(folder: str, inputs: str, outputs: str) -> None:
    """Load, run, write."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(inputs, framework="pt") as file:
        kind = file.metadata()["kind"]
    probes = load_file(inputs)
    model = _load(folder, kind)
    found = {}
    with torch.no_grad():
        for i in range(len(probes) // 2):
            result = model(input_ids=probes[f"ids_{i}"], attention_mask=probes[f"mask_{i}"])
            found[f"out_{i}"] = (result.logits if kind == "causal-lm" else result.last_hidden_state).contiguous()
    facts = {"model": type(model).__name__, "tokenizer": _tokenizer(folder), "generation": _generation(folder)}
    save_file(found, outputs, metadata={"facts": json.dumps(facts)})


def _load(folder: str, kind: str) -> Any:
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    reader: Any = AutoModelForCausalLM if kind == "causal-lm" else AutoModel
    file = next(Path(folder).glob("*.gguf"), None)
    said = {} if file is None else {"gguf_file": file.name}
    model, info = reader.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, local_files_only=True, **said
    )
    wrong = {key: sorted(map(str, names)) for key, names in info.items() if names}
    if wrong:
        sys.exit(f"transformers reports {json.dumps(wrong)}")
    return model.eval()


def _tokenizer(folder: str) -> dict[str, Any] | None:
    """The tokens of the probe texts, and those of their texts again; None where there is no tokenizer."""
    from transformers import AutoTokenizer

    files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt")
    if not any((Path(folder) / name).is_file() for name in files):
        return None
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = [tokenizer(text)["input_ids"] for text in PROBE_TEXTS]
    again = [_again(tokenizer, i) for i in ids]
    return {"ids": ids, "again": again, "chat": bool(getattr(tokenizer, "chat_template", None))}


def _again(tokenizer: Any, ids: list[int]) -> list[int]:
    """The tokens of the text of tokens. One that stands for what the tokenizer does not know has no text."""
    if tokenizer.unk_token_id in ids:
        return ids
    return list(tokenizer(tokenizer.decode(ids, skip_special_tokens=True))["input_ids"])


def _generation(folder: str) -> bool:
    from transformers import GenerationConfig

    if not (Path(folder) / "generation_config.json").is_file():
        return False
    GenerationConfig.from_pretrained(folder, local_files_only=True)
    return True


if __name__ == "__main__":
    main(*sys.argv[1:])
