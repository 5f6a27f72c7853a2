"""A training step on the CPU with INT4 weights that are packed at every step, beside plain fp32 and torchao's QAT.

python tools/bench/qat_step.py [--model seedling|25m] [--steps 20] [--check]        (torchao: pip install torchao)

All train every linear of the blocks by next-token loss, on the same tokens of the Python library's text, from the same
weights, with the same AdamW and 1,024 tokens a step. Int4 is symmetric, a scale for 32 weights. They run in processes
of their own and take their steps in turn. Peak memory is the high-water mark from the first step on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from torch import Tensor, nn

from tools.bench.turns import WARM, Training, put_model, ratio, serve, take_turns

LR = 1e-4
BLOCK: Literal[32] = 32
TIME, MEMORY = 1.06, 1.08
"""What a step may take, over the step of plain fp32."""


def prepare(work: Path, model: str, steps: int) -> None:
    """The model folder, and the tokens of every step and of what is held out."""
    from graph.checkpoint import locate
    from graph.tokenizer import load_tokenizer
    from runtimes.data.corpus import Corpus, Split
    from runtimes.settings import PythonStdlib

    put_model(work / "model", model)
    tokenizer = load_tokenizer(locate("seedling"), "seedling")
    sizes: dict[Split, int] = {"train": steps, "heldout": 8}
    for split, count in sizes.items():
        rows = Corpus(PythonStdlib(), Path()).rows(
            split,
            enough=1024 * count,
            tokenizer=tokenizer,
            length=128,
            cache=work / "tokens",
        )
        found = [rows.batch(range(8 * i, 8 * i + 8)).input_ids for i in range(count)]
        torch.save(torch.stack(found), work / f"{split}.pt")


class Qc:
    """Our side: what ``qc train`` does in a step, with latent INT4 weights, or with plain ones."""

    def __init__(self, work: Path, latent: bool):
        from graph import Selector, capture
        from passes.quantize_base import QuantizeBase
        from passes.runner import apply
        from passes.set_trainable import SetTrainable
        from runtimes.settings import Group, PythonStdlib, Train
        from runtimes.train.distribute import Processes
        from runtimes.train.groups import members, optimizer
        from runtimes.train.student import Student

        graph = capture(str(work / "model"), dtype=torch.float32).materialize()
        if latent:
            apply(QuantizeBase(scheme="int4", block=BLOCK, form="latent"), graph, check=False)
        else:
            weights = {"weights": Selector(role=("attn.*", "mlp.*"))}
            apply(SetTrainable(groups=weights, freeze_rest=True), graph, check=False)
        group = {"weights": Group(lr=LR, schedule="constant")}
        settings = Train(data=PythonStdlib(), steps=1, groups=group)
        self.student = Student(graph, settings, Processes(work, ()))
        adam = optimizer(members(graph, settings), self.student.parameters, graph, "adamw")
        self.training = Training(self.student, adam)
        for entry in adam.param_groups:
            entry["lr"] = LR
        self.tokens, self.heldout = torch.load(work / "train.pt"), torch.load(work / "heldout.pt")

    def step(self, number: int) -> float:
        """One step on the tokens of this number; of a number beyond them the held-out loss."""
        if number < len(self.tokens):
            return self.training.step(self.tokens[number])
        from runtimes.data import Batch

        with torch.no_grad():
            total = count = 0.0
            for tokens in self.heldout:
                labels = torch.full_like(tokens, -100)
                labels[:, :-1] = tokens[:, 1:]
                batch = Batch(tokens, torch.ones_like(tokens), labels)
                total += float(self.training.loss(self.student(batch, training=False), batch))
                count += float((labels >= 0).sum())
        return total / count


class Torchao:
    """The peer: transformers' model, its linears made fake-quantized ones by torchao."""

    def __init__(self, work: Path):
        from torchao.quantization import IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerGroup
        from torchao.quantization.qat import QATConfig
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32)
        base = IntxWeightOnlyConfig(weight_dtype=vars(torch)["int4"], granularity=PerGroup(BLOCK))

        def chosen(module: nn.Module, name: str) -> bool:
            return isinstance(module, nn.Linear) and "layers" in name

        quantize_(self.model, QATConfig(base, step="prepare"), filter_fn=chosen)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_("_proj." in name)
        self.model.train()
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=LR, weight_decay=0.0, fused=True)
        self.tokens, self.heldout = torch.load(work / "train.pt"), torch.load(work / "heldout.pt")

    def step(self, number: int) -> float:
        """One step on the tokens of this number; of a number beyond them the held-out loss."""
        if number >= len(self.tokens):
            with torch.no_grad():
                return float(torch.stack([self._loss(tokens) for tokens in self.heldout]).mean())
        loss = self._loss(self.tokens[number])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.item())

    def _loss(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens).loss
        return found


def main() -> None:
    """Run and print; with --check, fail where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="25m", help="25m, seedling or a folder")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--without-torchao", action="store_true")
    parser.add_argument("--check", action="store_true", help="exit 1 unless time and memory are within their limits")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.worker:
        serve(lambda: Torchao(said.work) if said.worker == "torchao" else Qc(said.work, said.worker == "int4"))
        return
    kinds = ("plain", "int4") if said.without_torchao else ("plain", "int4", "torchao")
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), said.model, said.steps + WARM)
        taken = take_turns(__file__, kinds, ["--work", folder], said.steps + 1)
    plain, good = taken["plain"], True
    for kind, side in taken.items():
        beside, memory = ratio(side.cpu_seconds[:-1], plain.cpu_seconds[:-1]), side.peak_mib / plain.peak_mib
        shown = {"cpu_ratio": round(beside, 3), "memory_ratio": round(memory, 3), "heldout_loss": side.losses[-1]}
        print(kind, json.dumps(shown | side.figures()), flush=True)
        good = good and (kind != "int4" or (beside <= TIME and memory <= MEMORY))
    if said.check and not good:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
