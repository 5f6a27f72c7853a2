"""Train the seedling: a small Qwen3 model of Python source, made from the standard library of this interpreter.

    python tools/seedling.py --out recipes/seedling --work build/seedling --steps 1400

A killed run goes on from its last checkpoint in the work folder. The learning rate warms up, stays, then decays over
the last part of `--steps`; to land a run early, stop it and start it again with fewer steps.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from runtimes.stdlib_text import is_test, stdlib_files
from tools.seedling_card import evaluate, probe_windows, samples, write_card
from tools.seedling_model import END, PAD, SPECIAL, Muon, encode, load, new_model, token_losses, train_tokenizer


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
        write_card(chosen, vars(plan), run.seconds, corpus.length, chosen.out)


if __name__ == "__main__":
    main()
