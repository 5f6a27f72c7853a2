"""The reader that an export is verified with: a process of its own, which knows transformers and not the graph.

``python -m runtimes.verify.weights_worker FOLDER INPUTS OUTPUTS`` loads the export, runs it on the probe batches of
INPUTS, and writes what comes out, and what it found of weights, tokenizer and generation settings, to OUTPUTS.
"""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from runtimes.verify.findings import PROBE_TEXTS


def main(folder: str, inputs: str, outputs: str) -> None:
    """Load, run, write."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(inputs, framework="pt") as file:
        asked = file.metadata()
    kind, probes = asked["kind"], load_file(inputs)
    found = {}
    with torch.no_grad(), _as_written(folder):
        model = _load(folder, kind, getattr(torch, asked["dtype"]))
        for i in range(len(probes) // 2):
            result = model(input_ids=probes[f"ids_{i}"], attention_mask=probes[f"mask_{i}"])
            found[f"out_{i}"] = (result.logits if kind == "causal-lm" else result.last_hidden_state).contiguous()
    weights = {name: _sha256_of(model.get_submodule(name)) for name in json.loads(asked["modules"])}
    facts = {"model": type(model).__name__, "tokenizer": _tokenizer(folder), "generation": _generation(folder)}
    facts |= {"weights": weights}
    save_file(found, outputs, metadata={"facts": json.dumps(facts)})


def _as_written(folder: str) -> AbstractContextManager[None]:
    """Inside, BitNet's linears run as they are written: compiling them takes a minute, and a compiler."""
    if _packing(folder) != "bitnet":
        return nullcontext()
    import torch

    eager: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return eager


def _packing(folder: str) -> str | None:
    """What the export says that its weights are packed as."""
    said = json.loads((Path(folder) / "config.json").read_text())
    return (said.get("quantization_config") or {}).get("quant_method")


def _load(folder: str, kind: str, dtype: Any) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM

    reader: Any = AutoModelForCausalLM if kind == "causal-lm" else AutoModel
    file = next(Path(folder).glob("*.gguf"), None)
    said = {} if file is None else {"gguf_file": file.name}
    packing = _packing(folder)
    wanted = "auto" if packing == "bitnet" else dtype  # which computes in the dtypes of its file, whatever it is told
    model, info = reader.from_pretrained(folder, dtype=wanted, output_loading_info=True, local_files_only=True, **said)
    wrong = {key: sorted(map(str, names)) for key, names in info.items() if names}
    if wrong:
        sys.exit(f"transformers reports {json.dumps(wrong)}")
    if packing == "bitnet":
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.to(dtype) if tensor.is_floating_point() else tensor.data
    if packing == "bitsandbytes":
        _compute_in(model, dtype)
    return model.eval()


def _compute_in(model: Any, dtype: Any) -> None:
    """Bitsandbytes computes in the dtype of its configuration, and on some processors in bf16, if it is not told."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = module.weight.quant_state.dtype = dtype
            module.compute_type_is_set, module.support_avx512bf16_for_cpu = True, False


def _sha256_of(module: Any) -> str:
    """The sha256 of a weight as it is multiplied with, in fp32."""
    import hashlib

    weight = module.weight.detach()
    if hasattr(module.weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(weight, module.weight.quant_state)
    return hashlib.sha256(weight.float().contiguous().numpy().tobytes()).hexdigest()


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
