"""The seedling's figures on held-out files, and the model card that tells them."""

from __future__ import annotations

import argparse
import copy
import lzma
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import __version__ as tokenizers_version
from torch import Tensor, nn
from transformers import GenerationConfig, Qwen3ForCausalLM, set_seed

from runtimes.stdlib_text import is_test, read_text, stdlib_files
from tools.seedling_model import END, SPECIAL, VOCABULARY, encode, load, token_losses

PROMPTS = ("def ", "import os\nimport sys\n\n\nclass ", "    def __init__(self, ", "for line in ")


def probe_windows(tokenizer: Any) -> Tensor:
    """The first windows of some held-out files, for the log and the range check only: [16, 513]."""
    rows = [row[:513] for row in encode(tokenizer, stdlib_files("heldout")) if len(row) >= 513]
    return torch.tensor(rows[:: len(rows) // 16][:16])


@torch.inference_mode()
def document_nats(model: Qwen3ForCausalLM, row: list[int], context: int, stride: int) -> float:
    """The cost of a whole document after an end mark, its own end mark included.

    Past the first window, every scored token has at least `context - stride` tokens before it.
    """
    ids = torch.tensor([[SPECIAL.index(END), *row]])
    total, done = 0.0, 0
    while done < len(row):
        end = min(max(done + stride, context), len(row))
        begin = max(0, end - context)
        total += token_losses(model, ids[:, begin : end + 1])[0, done - begin :].double().sum().item()
        done = end
    return total


@dataclass(frozen=True)
class Score:
    """Held-out files, and what they cost: raw, by the model and by xz, all in bytes but `files` and `tokens`."""

    files: int
    tokens: int
    size: int
    model: float
    xz_each: int
    xz_solid: int

    def bits(self, cost: float) -> float:
        return 8 * cost / self.size

    def row(self, name: str) -> str:
        costs = " | ".join(f"{self.bits(cost):.4f}" for cost in (self.model, self.xz_solid, self.xz_each))
        return f"| {name} | {self.files} | {self.size:,} | {self.tokens:,} | {costs} |"


def xz(data: bytes) -> int:
    return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def score(model: Qwen3ForCausalLM, tokenizer: Any, files: list[Path], context: int, stride: int) -> Score:
    data = [read_text(path).encode() for path in files]
    rows = encode(tokenizer, files)
    nats = sum(document_nats(model, row, context, stride) for row in rows)
    tokens, size = sum(map(len, rows)), sum(map(len, data))
    return Score(len(files), tokens, size, nats / math.log(256), sum(map(xz, data)), xz(b"".join(data)))


def joined(first: Score, second: Score, files: list[Path]) -> Score:
    """Both groups as one; only the solid archive is more than a sum."""
    solid = xz(b"".join(read_text(path).encode() for path in files))
    sums = {field.name: getattr(first, field.name) + getattr(second, field.name) for field in fields(Score)}
    return Score(**(sums | {"xz_solid": solid}))


def evaluate(model: Qwen3ForCausalLM, tokenizer: Any, context: int) -> dict[str, Score]:
    files = stdlib_files("heldout")
    library, tests = [path for path in files if not is_test(path)], [path for path in files if is_test(path)]
    scores = {"library": score(model, tokenizer, library, context, context // 2)}
    if tests:
        scores["tests"] = score(model, tokenizer, tests, context, context // 2)
        scores["all"] = joined(scores["library"], scores["tests"], files)
    for name, result in scores.items():
        print(result.row(name), flush=True)
    return scores


@torch.inference_mode()
def largest_activation(model: Qwen3ForCausalLM, windows: Tensor) -> float:
    """The largest magnitude any module puts out over the probe windows."""
    seen: list[float] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            seen.append(output.abs().max().item())

    hooks = [module.register_forward_hook(note) for module in model.modules()]
    token_losses(model, windows)
    for hook in hooks:
        hook.remove()
    return max(seen)


@torch.inference_mode()
def half_difference(model: Qwen3ForCausalLM, windows: Tensor) -> float:
    """How far the mean loss moves, in nats, when everything is computed in fp16."""
    half = copy.deepcopy(model).half()
    return abs(token_losses(half, windows).mean().item() - token_losses(model, windows).mean().item())


def samples(model: Qwen3ForCausalLM, tokenizer: Any, seed: int) -> list[str]:
    set_seed(seed)
    generate: Any = model.generate  # type: ignore[misc]  # its stub asks for a class that no model names
    texts = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        settings = GenerationConfig(
            do_sample=True, temperature=0.7, top_p=0.9, max_new_tokens=96, eos_token_id=0, pad_token_id=1
        )
        texts.append(tokenizer.decode(generate(**inputs, generation_config=settings)[0], skip_special_tokens=True))
    return texts


CARD = """# The seedling

A small Qwen3-style language model of Python source: {parameters:,} parameters, {layers} layers, tied head, grouped
queries, byte-level BPE of {vocabulary} tokens, fp16 weights. It exists so that `qc` can be tried, tested and measured
without a download. It knows the look of the Python standard library and nothing else.

## How it was made

```
{command}
```

Trained on the Python {python} standard library's own source, read from the interpreter that ran the script; none of
its text is in this repository. `runtimes/stdlib_text.py` has the rule: a file is held out when the SHA-256 of its path
below the standard library, as a number, divides by 20. The same files are held out everywhere, but their text
differs a little between Python releases, and so do the figures below.

- {tokens:,} tokens seen in {steps} steps; an epoch is {epoch:,} tokens, with library files {library_weight} times
  and test files once in each, so this is {epochs:.2f} of an epoch
- {minutes:.0f} minutes of training on {threads} shared CPU threads, fp32
- Muon for the matrices, AdamW for the embedding and the norms; warm-up, constant rate, then a linear decay over the
  last {decay:.0%} of the steps, where windows grow from {context} to {decay_context} tokens
{note}- seed {seed}, torch {torch}, transformers {transformers}, tokenizers {tokenizers}

## Held-out figures

Bits per byte, lower is better. Each file is scored by itself from a leading `{end}`, its closing `{end}` included,
in windows of {decay_context} tokens that advance by {stride}, with the fp16 weights of this folder computed in fp32.
`xz -9e` is given the same bytes, once as one archive of all files and once file by file.
Some held-out files resemble files that were trained on (the tables in `encodings/`, say), which xz has not seen.

| held out | files | bytes | tokens | model | xz, one archive | xz, by file |
| --- | --- | --- | --- | --- | --- | --- |
{rows}

{verdict}

The largest magnitude any module puts out is {activation:.0f} (fp16 holds 65504), the largest weight is {weight:.2f};
computing everything in fp16 moves the mean loss by {difference:.5f} nats.

## Tokens

`{end}` ends a document and is the eos token; there is no bos token. `{pad}` pads, `{mask}` is the mask token, and
`{turn}` and `{turn_end}` belong to the ChatML template. Only `{end}` occurred in training: the model does not chat.

## Samples

Temperature 0.7, top-p 0.9, 96 new tokens; the first line is the prompt or begins with it.
{samples}
"""


def write_card(chosen: argparse.Namespace, plan: Mapping[str, Any], seconds: float, epoch: int, out: Path) -> None:
    """Score the model in ``out``, and write its card. ``epoch`` is in tokens, ``seconds`` is the training's time."""
    model, tokenizer = load(out)
    scores, probe = evaluate(model, tokenizer, plan["decay_context"]), probe_windows(tokenizer)
    tokens = plan["steps"] * plan["tokens_a_step"]
    text = CARD.format(
        **dict(plan) | {"tokens": tokens, "epoch": epoch, "epochs": tokens / epoch, "minutes": seconds / 60},
        parameters=sum(weight.numel() for weight in model.parameters()),
        layers=model.config.num_hidden_layers,
        vocabulary=VOCABULARY,
        command=command(chosen),
        note=f"- {chosen.note}\n" if chosen.note else "",
        python=platform.python_version(),
        threads=chosen.threads,
        torch=torch.__version__,
        transformers=transformers.__version__,
        tokenizers=tokenizers_version,
        stride=plan["decay_context"] // 2,
        rows="\n".join(result.row(name) for name, result in scores.items()),
        verdict=verdict(list(scores.values())[-1]),
        activation=largest_activation(model, probe),
        weight=max(weight.abs().max().item() for weight in model.parameters()),
        difference=half_difference(model, probe[:4]),
        samples="".join(f"\n```python\n{sample.rstrip()}\n```\n" for sample in samples(model, tokenizer, plan["seed"])),
        **dict(zip(("end", "pad", "turn", "turn_end", "mask"), SPECIAL, strict=True)),
    )
    (out / "README.new").write_text(text.rstrip() + "\n", encoding="utf-8")
    os.replace(out / "README.new", out / "README.md")
    print(text)


def verdict(whole: Score) -> str:
    best = min(whole.xz_each, whole.xz_solid)
    bits = f"{whole.bits(whole.model):.4f} against {whole.bits(best):.4f} bits per byte"
    return f"The model {'beats' if whole.model < best else 'does NOT beat'} the better xz figure: {bits}."


def command(chosen: argparse.Namespace) -> str:
    return f"python tools/seedling.py --out recipes/seedling --steps {chosen.steps} --seed {chosen.seed}"
