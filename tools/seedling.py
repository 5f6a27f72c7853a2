"""Train the seedling: a small Qwen3 model of Python source, made from the standard library of this interpreter.

    python tools/seedling.py --out recipes/seedling --work build/seedling --steps 1400

A killed run goes on from its last checkpoint in the work folder. The learning rate warms up, stays, then decays over
the last part of `--steps`; to land a run early, stop it and start it again with fewer steps.
"""

from __future__ import annotations

import argparse
import copy
import lzma
import math
import os
import platform
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers import __version__ as tokenizers_version
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    set_seed,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from runtimes.stdlib_text import is_test, read_text, stdlib_files

END, PAD, TURN, TURN_END, MASK = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>", "<|mask|>"
SPECIAL = (END, PAD, TURN, TURN_END, MASK)
VOCABULARY = 4096
CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# A line break takes the next line's indentation along; a word takes one mark before it; digits go by threes.
WORDS = r"""\s*[\r\n][ \t]*|[ ._("'@]?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
PROMPTS = ("def ", "import os\nimport sys\n\n\nclass ", "    def __init__(self, ", "for line in ")


@dataclass(frozen=True)
class Plan:
    """What a run does, step by step; every number here follows from the command line."""

    steps: int
    tokens_a_step: int = 4096
    tokens_a_pass: int = 1024  # what one forward and backward holds
    context: int = 512
    decay_context: int = 1024  # longer windows once the learning rate decays
    warmup: int = 20
    decay: float = 0.3  # the last part of the steps
    matrix_rate: float = 0.02
    other_rate: float = 3e-3
    weight_decay: float = 0.1
    library_weight: int = 2  # how often an epoch shows a library file; a test file is shown once
    seed: int = 1

    @property
    def decay_start(self) -> int:
        return self.steps - int(self.steps * self.decay)

    def rate(self, step: int) -> float:
        """The factor on both learning rates."""
        if step < self.decay_start:
            return min(1.0, (step + 1) / self.warmup)
        return (self.steps - step) / (self.steps - self.decay_start + 1)


def train_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((read_text(path) for path in stdlib_files("train")), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        mask_token=MASK,
        additional_special_tokens=[TURN, TURN_END],
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    fast.chat_template = CHAT
    fast.save_pretrained(folder)


def new_model(seed: int) -> Qwen3ForCausalLM:
    set_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        intermediate_size=768,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=SPECIAL.index(END),
        pad_token_id=SPECIAL.index(PAD),
    )
    model = Qwen3ForCausalLM(config)
    for block in model.model.layers:  # every block starts as the identity
        nn.init.zeros_(block.self_attn.o_proj.weight)
        nn.init.zeros_(block.mlp.down_proj.weight)
    return model


class Muon:
    """Momentum whose update is the nearest orthogonal matrix; matrices of one shape go through it together."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        self.weights = weights
        self.momentum = [torch.zeros_like(weight) for weight in weights]

    @torch.no_grad()
    def step(self, rate: float, weight_decay: float) -> None:
        for shape in sorted({tuple(weight.shape) for weight in self.weights}):
            rows = [index for index, weight in enumerate(self.weights) if tuple(weight.shape) == shape]
            updates = orthogonal(torch.stack([self.direction(index) for index in rows]))
            size = rate * math.sqrt(max(1.0, shape[0] / shape[1]))
            for index, update in zip(rows, updates, strict=True):
                self.weights[index].mul_(1 - rate * weight_decay).sub_(update, alpha=size)

    def direction(self, index: int) -> Tensor:
        gradient = self.weights[index].grad
        assert gradient is not None
        self.momentum[index].lerp_(gradient, 0.05)
        return gradient.lerp(self.momentum[index], 0.95)


def orthogonal(matrices: Tensor) -> Tensor:
    """Five Newton-Schulz steps towards equal singular values: [n, rows, columns] -> the same."""
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonal(matrices.mT).mT
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


class Corpus:
    """The train split as an endless stream of tokens, reshuffled by document every epoch."""

    def __init__(self, tokenizer: Any, library_weight: int, seed: int, work: Path) -> None:
        files = stdlib_files("train")
        if not (work / "tokens.pt").exists():
            rows = [torch.tensor(row, dtype=torch.int16) for row in encode(tokenizer, files)]
            torch.save(rows, work / "tokens.new")
            os.replace(work / "tokens.new", work / "tokens.pt")
        documents = torch.load(work / "tokens.pt", weights_only=True)
        self.documents = [
            document
            for path, document in zip(files, documents, strict=True)
            for _ in range(1 if is_test(path) else library_weight)
        ]
        self.seed = seed
        self.length = sum(len(document) for document in self.documents)
        self.epoch, self.stream = -1, torch.empty(0, dtype=torch.int16)

    def read(self, epoch: int, offset: int, count: int) -> Tensor:
        """Tokens of an epoch; what runs over its end goes on at its beginning."""
        if epoch != self.epoch:
            order = torch.randperm(len(self.documents), generator=torch.Generator().manual_seed(self.seed + epoch))
            self.epoch, self.stream = epoch, torch.cat([self.documents[index] for index in order.tolist()])
        part = self.stream[offset : offset + count]
        return torch.cat([part, self.stream[: count - len(part)]]).long()


def encode(tokenizer: Any, files: list[Path]) -> list[list[int]]:
    """A document is its text and the end mark, so that a stream can be cut anywhere."""
    rows = tokenizer.backend_tokenizer.encode_batch([read_text(path) for path in files], add_special_tokens=False)
    return [[*row.ids, SPECIAL.index(END)] for row in rows]


def token_losses(model: Qwen3ForCausalLM, windows: Tensor) -> Tensor:
    """Nats of every token but the first: [batch, length + 1] -> [batch, length]."""
    hidden = model.model(input_ids=windows[:, :-1], use_cache=False).last_hidden_state
    logits = model.lm_head(hidden).float()
    return cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none").view(len(windows), -1)


class Run:
    """A training run: the model, its optimizers and the checkpoint that holds both.

    Passes run side by side, a core each: on a busy machine no core waits for another in the middle of a product.
    Their gradients are added in order, so the number of workers does not change the result.
    """

    def __init__(self, plan: Plan, work: Path, workers: int) -> None:
        self.workers = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
        self.plan, self.file, self.step, self.seconds = plan, work / "checkpoint.pt", 0, 0.0
        self.model = new_model(plan.seed)
        matrices = [p for name, p in self.model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name]
        others = [p for name, p in self.model.named_parameters() if p.ndim == 1 or "embed_tokens" in name]
        self.muon = Muon(matrices)
        self.adam = torch.optim.AdamW(others, lr=plan.other_rate, betas=(0.9, 0.95), weight_decay=0.0)
        if self.file.exists():
            self.load()

    def load(self) -> None:
        state = torch.load(self.file, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.muon.momentum = state["muon"]
        self.adam.load_state_dict(state["adam"])
        self.step, self.seconds = state["step"], state["seconds"]

    def save(self) -> None:
        state = {"model": self.model.state_dict(), "muon": self.muon.momentum, "adam": self.adam.state_dict()}
        torch.save(state | {"step": self.step, "seconds": self.seconds}, self.file.with_suffix(".new"))
        os.replace(self.file.with_suffix(".new"), self.file)

    def windows(self, corpus: Corpus) -> tuple[Tensor, ...]:
        """The windows of one step, a pass at a time; they come from places of the stream far from each other."""
        plan = self.plan
        length = plan.context if self.step < plan.decay_start else plan.decay_context
        lanes = plan.tokens_a_step // length
        reach = corpus.length // lanes
        epoch, offset = divmod(self.step * length, reach)
        windows = torch.stack([corpus.read(epoch, lane * reach + offset, length + 1) for lane in range(lanes)])
        return windows.split(plan.tokens_a_pass // length)

    def pass_gradients(self, windows: Tensor) -> tuple[float, tuple[Tensor, ...]]:
        loss = token_losses(self.model, windows).sum() / self.plan.tokens_a_step
        return loss.item(), torch.autograd.grad(loss, list(self.model.parameters()))

    def advance(self, corpus: Corpus) -> float:
        started, total, plan = time.monotonic(), 0.0, self.plan
        weights = list(self.model.parameters())
        for loss, gradients in self.workers.map(self.pass_gradients, self.windows(corpus)):
            total += loss
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        factor = plan.rate(self.step)
        self.adam.param_groups[0]["lr"] = plan.other_rate * factor
        self.adam.step()
        self.muon.step(plan.matrix_rate * factor, plan.weight_decay)
        self.model.zero_grad()
        self.step += 1
        self.seconds += time.monotonic() - started
        return total


def train(run: Run, corpus: Corpus, probe: Tensor) -> None:
    plan, losses, since, clock = run.plan, [], run.step, time.monotonic()
    print(f"{corpus.length:,} tokens an epoch; step {run.step} of {plan.steps}", flush=True)
    while run.step < plan.steps:
        losses.append(run.advance(corpus))
        if run.step % 10 == 0:
            speed = (run.step - since) * plan.tokens_a_step / (time.monotonic() - clock)
            mean, rate = sum(losses) / len(losses), plan.rate(run.step - 1)
            print(
                f"step {run.step:5d}  loss {mean:.4f}  rate {rate:.3f}  {speed:6.0f} tok/s  {run.seconds:.0f} s",
                flush=True,
            )
            losses, since, clock = [], run.step, time.monotonic()
        if run.step % 100 == 0:
            with torch.no_grad():
                print(f"held out, first windows: loss {token_losses(run.model, probe).mean().item():.4f}", flush=True)
        if run.step % 25 == 0 or run.step == plan.steps:
            run.save()


def probe_windows(tokenizer: Any) -> Tensor:
    """The first windows of some held-out files, for the log and the range check only: [16, 513]."""
    rows = [row[:513] for row in encode(tokenizer, stdlib_files("heldout")) if len(row) >= 513]
    return torch.tensor(rows[:: len(rows) // 16][:16])


def prepared_tokenizer(work: Path) -> Any:
    folder = work / "tokenizer"
    if not folder.exists():
        draft = Path(tempfile.mkdtemp(dir=work))
        train_tokenizer(draft)
        draft.rename(folder)
    return AutoTokenizer.from_pretrained(folder)


def export(model: Qwen3ForCausalLM, tokenizer: Any, out: Path) -> None:
    """Write the fp16 folder beside its place, then move it in file by file."""
    largest = max(weight.abs().max().item() for weight in model.parameters())
    if not largest < torch.finfo(torch.float16).max:
        raise SystemExit(f"a weight of {largest} does not fit fp16")
    half = copy.deepcopy(model).half()
    half.generation_config = GenerationConfig(eos_token_id=SPECIAL.index(END), pad_token_id=SPECIAL.index(PAD))
    out.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=out.parent, prefix=".seedling-"))
    half.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    for file in draft.iterdir():
        file.chmod(0o644)
        os.replace(file, out / file.name)
    draft.rmdir()


def load(out: Path) -> tuple[Qwen3ForCausalLM, Any]:
    """The exported model, its fp16 weights computed with in fp32."""
    model = Qwen3ForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(out)


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


def write_card(chosen: argparse.Namespace, run: Run, epoch: int, out: Path) -> None:
    plan = run.plan
    model, tokenizer = load(out)
    scores, probe = evaluate(model, tokenizer, plan.decay_context), probe_windows(tokenizer)
    tokens = plan.steps * plan.tokens_a_step
    text = CARD.format(
        **vars(plan) | {"tokens": tokens, "epoch": epoch, "epochs": tokens / epoch, "minutes": run.seconds / 60},
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
        stride=plan.decay_context // 2,
        rows="\n".join(result.row(name) for name, result in scores.items()),
        verdict=verdict(list(scores.values())[-1]),
        activation=largest_activation(model, probe),
        weight=max(weight.abs().max().item() for weight in model.parameters()),
        difference=half_difference(model, probe[:4]),
        samples="".join(f"\n```python\n{sample.rstrip()}\n```\n" for sample in samples(model, tokenizer, plan.seed)),
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


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the seedling model on the standard library's own source.")
    parser.add_argument("--out", type=Path, default=Path("recipes/seedling"), help="the model folder to write")
    parser.add_argument("--work", type=Path, default=Path("build/seedling"), help="tokenizer and checkpoint")
    parser.add_argument("--steps", type=int, default=1400, help=f"optimizer steps of {Plan.tokens_a_step} tokens")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--note", default="", help="a sentence for the card, where a run was not one plain command")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--evaluate-only", action="store_true", help="score the model in --out and sample from it")
    mode.add_argument("--export-now", action="store_true", help="export the last checkpoint as it is, without a card")
    return parser.parse_args()


def main() -> None:
    chosen = options()
    torch.set_num_threads(chosen.threads)
    plan = Plan(chosen.steps, seed=chosen.seed)
    if chosen.evaluate_only:
        model, tokenizer = load(chosen.out)
        evaluate(model, tokenizer, plan.decay_context)
        print("\n---\n".join(samples(model, tokenizer, plan.seed)))
        return
    chosen.work.mkdir(parents=True, exist_ok=True)
    tokenizer = prepared_tokenizer(chosen.work)
    run = Run(plan, chosen.work, chosen.threads)
    if not chosen.export_now:
        corpus = Corpus(tokenizer, plan.library_weight, plan.seed, chosen.work)
        train(run, corpus, probe_windows(tokenizer))
    export(run.model, tokenizer, chosen.out)
    if not chosen.export_now:
        write_card(chosen, run, corpus.length, chosen.out)


if __name__ == "__main__":
    main()
