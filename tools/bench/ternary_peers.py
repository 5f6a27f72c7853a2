"""Held-out perplexity after as many steps of ternary training: ours, transformers' BitLinear, torchao's PARQ.

python tools/bench/ternary_peers.py [--steps 30] [--rates 5e-4 1.5e-3] [--only NAME ...] [--write]

All begin with the seedling, make every linear of its blocks ternary and train nothing else, on the same tokens in the
same order, 1,024 a step, with the same AdamW, warm-up, cosine and clipping; of several learning rates each side has its
best. ``qc`` learns the next token as the peers do; ``qc, distilled`` what the FP16 model says of the same text. All
begin with the weights as they are, unlike the shipped recipe. BitLinear has one scale a weight and rounds tokens to 8
bits, as it is made; PARQ finds its values anew at every step, straight through, by row or by as many columns as ours,
or annealed over the first three quarters.
What was run before is taken from --runs; with --only nothing else is trained. With --write the table goes into
docs/ternary.md. Needs torchao.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from torch import Tensor, nn

from tools.bench.turns import ROOT, put_model

GROUP = 64
"""Columns that share a scale in the shipped recipe."""

RULE: Mapping[str, Any] = {"tau": 0.7, "scale": "least-squares"}


BATCH, LENGTH, HELDOUT = 8, 128, 8
"""Rows of a batch, tokens of a row, and batches to measure on."""

VARIETY = 8
"""One of so many rows of the text is trained on."""


@dataclass
class Side:
    """Something that trains: what, and by which loss."""

    weights: Sequence[Tensor]
    loss: Callable[[Tensor], Tensor]
    """The loss of tokens [batch, length], a mean over them."""

    heldout: Callable[[Tensor], Tensor]
    """The mean cross entropy of such tokens."""

    around: Callable[[Any], Any] = lambda optimizer: optimizer
    """What the optimizer is wrapped into."""

    groups: Mapping[str, Any] | None = None
    """What the optimizer is told of its weights."""

    rounds: int | None = None
    """Columns of which the weights hold three values once trained, for a side whose optimizer rounds them."""


@dataclass(frozen=True)
class Case:
    """A row of the table."""

    name: str
    make: Callable[[Path, int], Side]
    """From a folder that ``prepare`` filled and the number of steps."""

    share: Callable[[tuple[int, int]], int]
    """How many weights share a scale, of a weight of this shape."""

    next_token: bool = True
    """Learns the next token, and not from a teacher."""


def ours(work: Path, columns: int | None, distilled: bool = False) -> Side:
    """What ``qc train`` computes, with scales for so many columns or for rows."""
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
    shared: Mapping[str, Any] = {} if columns is None else {"granularity": "group", "group": columns}
    apply(TernarySte(**RULE, **shared), graph, check=False)
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


def bitlinear(work: Path, steps: int) -> Side:
    """Every linear of the blocks as transformers' AutoBitLinear, which rounds its weight each time it is read."""
    from transformers.integrations.bitnet import AutoBitLinear

    model, loss = _theirs(work)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "layers" in name:
            made = AutoBitLinear(module.in_features, module.out_features, bias=False, online_quant=True)
            made.weight = module.weight
            model.set_submodule(name, made)
    return Side(_only_linears(model), loss, loss)


def parq(work: Path, annealed: int, columns: int | None = None) -> Side:
    """The optimizer of torchao; ``annealed`` is the step at which its values are ternary, 0 for all the time."""
    from torchao.prototype.parq.optim import ProxHardQuant, ProxPARQ, QuantOptimizer
    from torchao.prototype.parq.quant import LSBQuantizer

    model, loss = _theirs(work)

    def around(optimizer: Any) -> Any:
        values = ProxPARQ(0, annealed) if annealed else ProxHardQuant()
        return QuantOptimizer(optimizer, LSBQuantizer(), values, quant_period=1, quant_per_channel=True)

    weights = _only_linears(model)
    groups = {"quant_bits": 0} | ({} if columns is None else {"quant_block_size": columns})
    return Side(weights, loss, loss, around, groups, rounds=columns or 0)


def _theirs(work: Path) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """The model as transformers has it, and its loss."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32)

    def loss(tokens: Tensor) -> Tensor:
        found: Tensor = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens).loss
        return found

    return model, loss


def _only_linears(model: Any) -> list[Tensor]:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("_proj." in name)
    model.train()
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def anneal_end(steps: int) -> int:
    """The step from which on PARQ's values are ternary: some are left to train with them."""
    return steps * 3 // 4


CASES = (
    Case("qc", lambda work, _: ours(work, GROUP), lambda shape: GROUP),
    Case("qc, scales by row", lambda work, _: ours(work, None), lambda shape: shape[1]),
    Case("qc, distilled", lambda work, _: ours(work, GROUP, distilled=True), lambda shape: GROUP, next_token=False),
    Case("transformers BitLinear", bitlinear, math.prod),
    Case("torchao PARQ, straight through", lambda work, _: parq(work, 0), lambda shape: shape[1]),
    Case("torchao PARQ, straight through, groups", lambda work, _: parq(work, 0, GROUP), lambda shape: GROUP),
    Case("torchao PARQ, annealed, groups", lambda work, steps: parq(work, anneal_end(steps), GROUP), lambda _: GROUP),
)


def prepare(work: Path, steps: int) -> None:
    """The model, the tokens of every step, drawn from many files as ``qc train`` draws them, and what is held out."""
    from graph.checkpoint import locate
    from graph.tokenizer import load_tokenizer
    from runtimes.data.corpus import Corpus
    from runtimes.settings import PythonStdlib

    put_model(work / "model", "seedling")
    tokenizer = load_tokenizer(locate("seedling"), "seedling")

    def rows(split: Literal["train", "heldout"], batches: int) -> Any:
        enough = batches * BATCH * LENGTH
        told: dict[str, Any] = {"tokenizer": tokenizer, "length": LENGTH, "cache": work / "tokens", "seed": 0}
        return Corpus(PythonStdlib(), Path()).rows(split, enough=enough, **told)

    train, heldout = rows("train", VARIETY * steps), rows("heldout", HELDOUT)
    torch.save(torch.stack([train.shuffled(BATCH * at, BATCH).input_ids for at in range(steps)]), work / "train.pt")
    held = [heldout.batch(range(BATCH * at, BATCH * (at + 1))).input_ids for at in range(HELDOUT)]
    torch.save(torch.stack(held), work / "heldout.pt")


def train(side: Side, tokens: Sequence[Tensor], rate: float) -> list[float]:
    """One step for each batch of tokens; their losses."""
    from runtimes.settings import Group
    from runtimes.train.schedules import rate as scheduled

    group, losses = Group(lr=rate, warmup=0.1, min_lr_ratio=0.05), []
    said = [{"params": side.weights, **(side.groups or {})}]
    optimizer = side.around(torch.optim.AdamW(said, lr=rate, weight_decay=0.0))
    for step, batch in enumerate(tokens):
        for entry in optimizer.param_groups:
            entry["lr"] = scheduled(group, step, len(tokens))
        loss = side.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(side.weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    return losses


def values_of(weight: Tensor, columns: int) -> int:
    """The most values that a row of the weight holds, or so many columns of one."""
    rows = weight.detach().reshape(-1, columns or weight.shape[-1]).sort(-1).values
    return int((rows.diff(dim=-1) != 0).sum(-1).max()) + 1


def measure(case: Case, work: Path, rate: float, steps: int) -> dict[str, float]:
    """Train one side with one learning rate, and measure it on what is held out."""
    side = case.make(work, steps)
    losses = train(side, torch.load(work / "train.pt"), rate)
    if side.rounds is not None:
        assert max(values_of(weight, side.rounds) for weight in side.weights) <= 3, f"{case.name} is not ternary"
    with torch.no_grad():
        loss = torch.stack([side.heldout(tokens) for tokens in torch.load(work / "heldout.pt")]).mean()
    shapes = [(weight.shape[0], weight.shape[1]) for weight in side.weights]
    stored = sum(math.prod(shape) * (2 + 16 / case.share(shape)) for shape in shapes)
    return {
        "perplexity": math.exp(float(loss)),
        "bits": stored / sum(math.prod(shape) for shape in shapes),
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def table(found: Mapping[str, Mapping[float, Mapping[str, float]]], rates: Sequence[float], steps: int) -> str:
    """One line a side, the best of the learning rates last; and who is ahead."""
    lines = [f"| after {steps} steps | bits | " + " | ".join(f"rate {rate:g}" for rate in rates) + " | best |"]
    lines.append("|---" * (len(rates) + 3) + "|")
    best = {name: min(each["perplexity"] for each in by_rate.values()) for name, by_rate in found.items()}
    for name, by_rate in found.items():
        cells = [f"{by_rate[rate]['perplexity']:.2f}" if rate in by_rate else "" for rate in rates]
        bits = next(iter(by_rate.values()))["bits"]
        lines.append(f"| {name} | {bits:.2f} | {' | '.join(cells)} | {best[name]:.2f} |")
    fair = {case.name: best[case.name] for case in CASES if case.next_token and case.name in best}
    first = min(fair, key=lambda name: fair[name])
    rest = {name: value for name, value in fair.items() if name.startswith("qc") != first.startswith("qc")}
    if rest:
        second = min(rest, key=lambda name: rest[name])
        ahead = 1 - fair[first] / fair[second]
        lines += ["", f"Of those that learn the next token {first} is the lowest, {ahead:.1%} below {second}."]
    return "\n".join(lines)


def main() -> None:
    """Train all sides one after the other and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 1.5e-3])
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES], metavar="NAME", help="trained now")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/ternary-peers")
    parser.add_argument("--write", action="store_true", help="put the table into docs/ternary.md")
    said = parser.parse_args()
    found: dict[str, dict[float, dict[str, float]]] = {}
    said.runs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, torch.compiler.set_stance("force_eager"):
        prepare(Path(folder), said.steps)
        for case in CASES:
            for rate in said.rates:
                kept = said.runs / f"{case.name.replace(', ', '-').replace(' ', '-')}-{rate:g}-{said.steps}.json"
                if not kept.exists():
                    if said.only is not None and case.name not in said.only:
                        continue
                    kept.write_text(json.dumps(measure(case, Path(folder), rate, said.steps)))
                found.setdefault(case.name, {})[rate] = json.loads(kept.read_text())
                print(f"{case.name}, rate {rate:g}: {found[case.name][rate]}", file=sys.stderr, flush=True)
    made = table(found, said.rates, said.steps)
    print(made)
    if said.write:
        from tools.bench.tables import replace_table

        replace_table("ternary-peers", made, page="ternary.md")


if __name__ == "__main__":
    main()
