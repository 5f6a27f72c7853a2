"""The reader of an export of two models: a process of its own, which knows transformers and not the graph.

``python -m runtimes.verify.joint_worker FOLDER INPUTS OUTPUTS`` loads encoder, decoder and what goes between them, runs
them on the probe of INPUTS, and writes logits, and what it found of tokenizers and generation settings, to OUTPUTS.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from runtimes.verify.weights_worker import generation_found, load_model, tokens_found


def main(folder: str, inputs: str, outputs: str) -> None:
    """Load, run, write."""
    import torch
    from safetensors.torch import load_file, save_file

    where, read = Path(folder), load_file(inputs)
    about = json.loads((where / "memory.json").read_text())
    weights = {name: value.float() for name, value in load_file(where / "memory.safetensors").items()}
    encoder = load_model(str(where / "encoder"), "encoder", torch.float32)
    decoder = load_model(str(where / "decoder"), "causal-lm", torch.float32)
    with torch.no_grad():
        memory = _memory(encoder, read, weights, about)
        for name, form in about["layers"].items():
            prefix = f"{name}.gca."
            own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
            decoder.get_submodule(name).register_forward_hook(_Look(own, form, memory))
        logits = decoder(input_ids=read["input_ids"], attention_mask=read["attention_mask"]).logits
    facts = {
        "model": f"{type(encoder).__name__} and {type(decoder).__name__}",
        "encoder": tokens_found(str(where / "encoder")),
        "tokenizer": tokens_found(str(where / "decoder")),
        "generation": generation_found(str(where / "decoder")),
    }
    save_file({"logits": logits.contiguous()}, outputs, metadata={"facts": json.dumps(facts)})


def _memory(encoder: Any, read: dict[str, Any], weights: dict[str, Any], about: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Keys, values and mask of the memory of each row: every chunk is read by itself, and padding is left out."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    rows = []
    for ids, mask in zip(read["memory_ids"], read["memory_attention"], strict=True):
        found = [torch.zeros(0, encoder.config.hidden_size)]
        for chunk, kept in zip(ids, mask.bool(), strict=True):
            if kept.any():
                length = int(kept.sum())
                both = about["encoder"]["attention"] == "bidirectional"
                seen = {"attention_mask": torch.zeros(1, 1, length, length)} if both else {}
                found.append(encoder(input_ids=chunk[kept][None], **seen).last_hidden_state[0])
        rows.append(torch.cat(found)[: about["max_tokens"]])
    states = pad_sequence(rows, batch_first=True)
    mask = torch.arange(states.shape[1])[None] < torch.tensor([[len(row)] for row in rows])
    shared = weights.get("memory.weight")
    each = (weights.get(f"memory_{one}.weight", shared) for one in ("key", "value"))
    keys, values = (states if weight is None else states @ weight.T for weight in each)
    return keys, values, mask


class _Look:
    """The cross-attention behind a layer."""

    def __init__(self, weights: dict[str, Any], form: dict[str, Any], memory: tuple[Any, Any, Any]):
        self.weights, self.form, self.memory = weights, form, memory

    def __call__(self, layer: Any, args: Any, x: Any) -> Any:
        import torch
        from torch.nn.functional import linear

        def project(source: Any, name: str, heads: int) -> Any:
            made: Any = linear(source, self.weights[f"{name}_proj.weight"])
            return made.unflatten(-1, (heads, -1)).transpose(1, 2)

        keys, values, mask = self.memory
        z = torch.nn.functional.rms_norm(x, x.shape[-1:], self.weights["norm.weight"], self.form["eps"])
        heads, kv_heads = self.form["heads"], self.form["kv_heads"]
        q, k, v = project(z, "q", heads), project(keys, "k", kv_heads), project(values, "v", kv_heads)
        k, v = (one.repeat_interleave(q.shape[1] // one.shape[1], dim=1) for one in (k, v))
        scores = (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~mask[:, None, None], -1e9).softmax(-1)
        update = linear((weights @ v).transpose(1, 2).flatten(2), self.weights["o_proj.weight"])
        gate = getattr(torch, self.form["gate"])(self.weights["gate"])
        return x + gate * update * mask.any(1)[:, None, None]


if __name__ == "__main__":
    main(*sys.argv[1:])
