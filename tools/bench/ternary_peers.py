"""Held-out perplexity after as many steps of ternary training: ours, transformers' BitLinear, torchao's PARQ.

python tools/bench/ternary_peers.py [--steps 100] [--rates 5e-4 2e-3] [--only NAME ...]   (pip install torchao)

All begin with the seedling, make every linear of the blocks ternary and train nothing else, on the same tokens in the
same order, 1,024 a step, with the same AdamW, warm-up and cosine; of several learning rates each side has its best.
``qc`` learns the next token as the peers do, ``qc, distilled`` what the FP16 model says of the same text, as the
shipped recipe does. BitLinear has one scale a weight and rounds tokens to 8 bits, as it is made; PARQ has least-squares
values by row, found anew at every step, straight through or annealed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from torch import Tensor, nn

from tools.bench.qat_step import prepare

RULE: dict[str, Any] = {"tau": 0.7, "scale": "least-squares", "granularity": "group", "group": 64}


@dataclass
class Side:
    """Something that trains: what, and by which loss."""

    weights: list[Tensor]
    loss: Callable[[Tensor], Tensor]
    """The loss of tokens [batch, length], a mean over them."""

    heldout: Callable[[Tensor], Tensor]
    """The mean cross entropy of such tokens."""

    around: Callable[[Any], Any] = lambda optimizer: optimizer
    """What the optimizer is wrapped into."""

    groups: dict[str, Any] | None = None
    """What its group of weights says beside them."""


def ours(work: Path, distilled: bool) -> Side:
    """What ``qc train`` computes."""
    from graph import capture
    from passes.runner import apply
    from passes.ternary_ste import TernarySte
    from runtimes.data import Batch
    from runtimes.settings import Group, Kd, PythonStdlib, Train
    from runtimes.train.distribute import Processes
    from runtimes.train.objectives import loss_of, next_token
    from runtimes.train.student import Student

    graph = capture(str(work / "model"), dtype=torch.float32).materialize()
    teacher = capture(str(work / "model"), dtype=torch.float32).materialize()
    apply(TernarySte(**RULE), graph, check=False)
    settings = Train(data=PythonStdlib(), steps=1, groups={"weights": Group(lr=1e-3)})
    processes = Processes(work, ())
    student = Student(graph, settings, processes)
    taught = loss_of(Kd(temperature=2.0), teacher, torch.float32, processes.device, 1) if distilled else None

    def batch_of(tokens: Tensor) -> Batch:
        labels = torch.full_like(tokens, -100)
        labels[:, :-1] = tokens[:, 1:]
        return Batch(tokens, torch.ones_like(tokens), labels)

    def loss(tokens: Tensor) -> Tensor:
        batch = batch_of(tokens)
        features = student(batch, training=True)
        total = next_token(features, batch) if taught is None else taught(features, batch, 0)[0]
        return total / (batch.labels >= 0).sum()

    def heldout(tokens: Tensor) -> Tensor:
        batch = batch_of(tokens)
        return next_token(student(batch, training=False), batch) / (batch.labels >= 0).sum()

    return Side(list(student.parameters.values()), loss, heldout)


def theirs(work: Path) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """The model as transformers has it, and its loss."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32)

    def loss(tokens: Tensor) -> Tensor:
        found: Tensor = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens).loss
        return found

    return model, loss


def bitlinear(work: Path) -> Side:
    """Every linear of the blocks as transformers' AutoBitLinear, which rounds its weight each time it is read."""
    from transformers.integrations.bitnet import AutoBitLinear

    model, loss = theirs(work)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "layers" in name:
            made = AutoBitLinear(module.in_features, module.out_features, bias=False, online_quant=True)
            made.weight = module.weight
            model.set_submodule(name, made)
    return Side(_only_linears(model), loss, loss)


def parq(work: Path, annealed: int) -> Side:
    """The optimizer of torchao; ``annealed`` is the step at which its values are ternary, 0 for all the time."""
    from torchao.prototype.parq.optim import ProxHardQuant, ProxPARQ, QuantOptimizer
    from torchao.prototype.parq.quant import LSBQuantizer

    model, loss = theirs(work)

    def around(optimizer: Any) -> Any:
        values = ProxPARQ(0, annealed) if annealed else ProxHardQuant()
        return QuantOptimizer(optimizer, LSBQuantizer(), values, quant_period=1, quant_per_channel=True)

    return Side(_only_linears(model), loss, loss, around, {"quant_bits": 0})


def _only_linears(model: Any) -> list[Tensor]:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("_proj." in name)
    model.train()
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def perplexity(side: Side, work: Path, rate: float, steps: int) -> float:
    """Train, and measure on what is held out."""
    from runtimes.settings import Group
    from runtimes.train.schedules import rate as scheduled

    group = Group(lr=rate, warmup=0.1, min_lr_ratio=0.05)
    said = [{"params": side.weights, **(side.groups or {})}]
    optimizer = side.around(torch.optim.AdamW(said, lr=rate, weight_decay=0.0))
    for step, tokens in enumerate(torch.load(work / "train.pt")):
        for entry in optimizer.param_groups:
            entry["lr"] = scheduled(group, step, steps)
        side.loss(tokens).backward()
        nn.utils.clip_grad_norm_(side.weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        return math.exp(float(torch.stack([side.heldout(tokens) for tokens in torch.load(work / "heldout.pt")]).mean()))


def main() -> None:
    """Train all sides one after the other and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 2e-3])
    parser.add_argument("--only", nargs="+", help="names of sides")
    said = parser.parse_args()
    sides: dict[str, Callable[[Path], Side]] = {
        "qc": lambda work: ours(work, distilled=False),
        "qc, distilled": lambda work: ours(work, distilled=True),
        "transformers BitLinear": bitlinear,
        "torchao PARQ, hard": lambda work: parq(work, 0),
        "torchao PARQ, annealed": lambda work: parq(work, said.steps * 3 // 4),
    }
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder, torch.compiler.set_stance("force_eager"):
        work = Path(folder)
        prepare(work, "seedling", said.steps)
        for name, make in sides.items():
            if said.only is None or name in said.only:
                found[name] = {f"{rate:g}": perplexity(make(work), work, rate, said.steps) for rate in said.rates}
                print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
    print(json.dumps({name: {**rates, "best": min(rates.values())} for name, rates in found.items()}, indent=1))


if __name__ == "__main__":
    main()
