"""A QLoRA step on the CPU, qc beside peft + bitsandbytes + transformers: time, peak memory, and the losses of both.

python tools/bench/qlora_step.py [--model seedling|25m] [--steps 50] [--precision fp32|bf16] [--check]

Both train the same NF4 base from the same LoRA initialisation on the same random tokens, dropout off, the same AdamW.
They run in processes of their own and take their steps in turn, so that a busy machine slows both. Peak memory is the
high-water mark of the resident set from the first step on, above nothing: the whole process counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent.parent
RANK, ALPHA, LR = 16, 32, 2e-4


def prepare(work: Path, model: str, batch: int, length: int, steps: int) -> None:
    """The model folder, the adapter both begin with, and the tokens."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    from graph import capture
    from graph.adapter import save_adapter
    from graph.checkpoint import locate
    from passes.add_lora import AddLora

    if model == "25m":
        torch.manual_seed(0)
        config = Qwen3Config(
            hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4, head_dim=64,
            intermediate_size=1536, vocab_size=4096, max_position_embeddings=2048, tie_word_embeddings=True,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config).save_pretrained(work / "model")
    else:
        (work / "model").symlink_to(locate(model))
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
        from runtimes.train.objectives import next_token
        from runtimes.train.student import Student

        graph = capture(str(work / "model"), dtype=torch.float32)
        apply(QuantizeBase(scheme="nf4", double_quant=True), graph, check=False)
        graph.materialize()
        apply(AddLora(rank=RANK, alpha=ALPHA), graph, check=False)
        group = {"lora": Group(lr=LR, schedule="constant")}
        settings = Train(data=PythonStdlib(), steps=1, groups=group, precision=precision)  # type: ignore[arg-type]
        self.student = Student(graph, settings, Processes(work, ()))
        self.optimizer = optimizer(members(graph, settings), self.student.parameters, graph, "adamw")
        for entry in self.optimizer.param_groups:
            entry["lr"] = LR
        self.loss = next_token

    def step(self, tokens: Tensor) -> float:
        from runtimes.data import Batch

        labels = torch.full_like(tokens, -100)
        labels[:, :-1] = tokens[:, 1:]
        batch = Batch(tokens, torch.ones_like(tokens), labels)
        loss = self.loss(self.student(batch, training=True), batch) / (labels >= 0).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(self.student.parameters.values()), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


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

    def step(self, tokens: Tensor) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            loss = self.model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.item())


def worker(kind: str, work: Path, precision: str) -> None:
    """Take a step for every line on stdin; answer with loss, seconds and the memory's high-water mark."""
    side = (Qc if kind == "qc" else Peft)(work, precision)
    tokens = torch.load(work / "tokens.pt")
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts here: loading does not count
    print("ready", flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        loss = side.step(tokens[int(line)])
        seconds = time.perf_counter() - start
        status = Path("/proc/self/status").read_text().split("VmHWM:")[1]
        print(json.dumps([loss, seconds, int(status.split()[0]) / 1024]), flush=True)


def compare(work: Path, precision: str, steps: int) -> dict[str, Any]:
    """Both sides, step by step in turn."""
    command = [sys.executable, __file__, "--worker"]
    sides = {
        kind: subprocess.Popen(
            [*command, kind, "--work", str(work), "--precision", precision],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )
        for kind in ("qc", "peft")
    }  # fmt: skip
    for process in sides.values():
        assert process.stdout is not None
        while process.stdout.readline().strip() != "ready":
            assert process.poll() is None, "a side could not start"
    rows: dict[str, list[list[float]]] = {kind: [] for kind in sides}
    for step in range(steps):
        for kind, process in sides.items():
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(f"{step}\n")
            process.stdin.flush()
            rows[kind].append(json.loads(process.stdout.readline()))
    for process in sides.values():
        process.communicate()
    found: dict[str, Any] = {}
    for kind, taken in rows.items():
        times = [seconds for _, seconds, _ in taken[2:]]
        found[kind] = {"step_s": statistics.median(times), "step_min_s": min(times), "peak_mib": taken[-1][2]}
    ratios = [a[1] / b[1] for a, b in zip(rows["qc"][2:], rows["peft"][2:], strict=True)]
    found["time_ratio"] = statistics.median(ratios)
    found["time_ratio_min"] = found["qc"]["step_min_s"] / found["peft"]["step_min_s"]
    found["memory_ratio"] = found["qc"]["peak_mib"] / found["peft"]["peak_mib"]
    found["largest_loss_gap"] = max(abs(a[0] - b[0]) for a, b in zip(rows["qc"], rows["peft"], strict=True))
    found["losses"] = [rows["qc"][0][0], rows["qc"][-1][0]]
    return found


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
        worker(said.worker, said.work, said.precision)
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), said.model, said.batch, said.length, said.steps)
        found = compare(Path(folder), said.precision, said.steps)
    print(json.dumps(found, indent=1))
    good = found["time_ratio"] <= 0.9 and found["memory_ratio"] <= 0.9 and found["largest_loss_gap"] <= 1e-3
    if said.check and not good:
        raise SystemExit(1)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
