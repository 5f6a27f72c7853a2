"""A QLoRA step on the CPU, qc beside peft + bitsandbytes + transformers: time, peak memory, and the losses of both.

python tools/bench/qlora_step.py [--model seedling|25m] [--steps 50] [--precision fp32|bf16] [--check]

Both train the same NF4 base from the same LoRA initialisation on the same random tokens, dropout off, the same AdamW.
They run in processes of their own and take their steps in turn, so that a busy machine slows both. Peak memory is the
high-water mark of the resident set from the first step on, above nothing: the whole process counts.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch

from tools.bench.turns import WARM, Training, beside, put_model, serve, take_turns

RANK, ALPHA, LR = 16, 32, 2e-4


def prepare(work: Path, model: str, batch: int, length: int, steps: int) -> None:
    """The model folder, the adapter both begin with, and the tokens."""
    from graph import capture
    from graph.adapter import save_adapter
    from passes.add_lora import AddLora

    put_model(work / "model", model)
    graph = capture(str(work / "model"), dtype=torch.float32).materialize()
    AddLora(rank=RANK, alpha=ALPHA).run(graph)
    save_adapter(graph, work / "adapter", base_model=str(work / "model"))
    generator = torch.Generator().manual_seed(1)
    torch.save(torch.randint(0, 4096, (steps, batch, length), generator=generator), work / "tokens.pt")


class Qc:
    """Our side: what ``qc train`` does in a step."""

    def __init__(self, work: Path, precision: str):
        from graph import capture
        from passes.add_lora import AddLora
        from passes.quantize_base import QuantizeBase
        from passes.runner import apply
        from runtimes.settings import Group, PythonStdlib, Train
        from runtimes.train.distribute import Processes
        from runtimes.train.groups import members, optimizer
        from runtimes.train.student import Student

        graph = capture(str(work / "model"), dtype=torch.float32)
        apply(QuantizeBase(scheme="nf4", double_quant=True), graph, check=False)
        graph.materialize()
        apply(AddLora(rank=RANK, alpha=ALPHA), graph, check=False)
        group = {"lora": Group(lr=LR, schedule="constant")}
        settings = Train(data=PythonStdlib(), steps=1, groups=group, precision=precision)  # type: ignore[arg-type]
        student = Student(graph, settings, Processes(work, ()))
        self.training = Training(student, optimizer(members(graph, settings), student.parameters, graph, "adamw"))
        for entry in self.training.optimizer.param_groups:
            entry["lr"] = LR
        self.tokens = torch.load(work / "tokens.pt")

    def step(self, number: int) -> float:
        """One step on the tokens of this number."""
        return self.training.step(self.tokens[number])


class Peft:
    """The peer: transformers' model with bitsandbytes' Linear4bit and peft's LoRA, eager."""

    def __init__(self, work: Path, precision: str):
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        base = AutoModelForCausalLM.from_pretrained(
            work / "model", quantization_config=quantization, dtype=dtype, device_map="cpu"
        )
        self.model: Any = PeftModel.from_pretrained(base, work / "adapter", is_trainable=True)
        self.model.train()
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=LR, weight_decay=0.0, fused=True)
        self.autocast = precision == "bf16"
        self.tokens = torch.load(work / "tokens.pt")

    def step(self, number: int) -> float:
        """One step on the tokens of this number."""
        tokens = self.tokens[number]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            loss = self.model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.item())


def compare(work: Path, precision: str, steps: int) -> dict[str, Any]:
    """Both sides, step by step in turn."""
    taken = take_turns(__file__, ("qc", "peft"), ["--work", str(work), "--precision", precision], steps)
    figures = {kind: side.figures() for kind, side in taken.items()}
    ours = taken["qc"]
    return {**figures, **beside(ours, taken["peft"]), "losses": [ours.losses[0], ours.losses[-1]]}


def main() -> None:
    """Run and print; with --check, fail where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="25m", help="25m, seedling or a folder")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--check", action="store_true", help="exit 1 unless time and memory <= 0.9, losses within 1e-3")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.worker:
        serve(lambda: (Qc if said.worker == "qc" else Peft)(said.work, said.precision))
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), said.model, said.batch, said.length, said.steps + WARM)
        found = compare(Path(folder), said.precision, said.steps)
    print(json.dumps(found, indent=1))
    good = found["time_ratio"] <= 0.9 and found["memory_ratio"] <= 0.9 and found["largest_loss_gap"] <= 1e-3
    if said.check and not good:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
