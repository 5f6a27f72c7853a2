"""The loss of kd-cache beside the dense loss: peak memory and time of a forward and backward, and their ratios.

python tools/bench/kd_loss.py [--vocabulary 151936] [--hidden 512] [--tokens 1024] [--topk 64] [--check]

The dense loss is the leanest plain one: the student's logits and F.log_softmax of the whole vocabulary, from which
the candidates are read (the teacher's logits are given), and the gradient of the hidden states. The candidate loss is
kl alone; the full one is kl and hard_full. Each runs in a process of its own; memory is the high-water mark of the
resident set above what stood there before the loss.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent.parent
KINDS = ("dense", "candidates", "full")
TEMPERATURE = 2.0
GOALS = {"candidates": {"memory": 0.03, "time": 0.05}, "full": {"memory": 0.12}}


def prepare(said: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, the head's weight, and the teacher's candidates: ids and logits."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(said.tokens, said.hidden, generator=generator)
    weight = torch.randn(said.vocabulary, said.hidden, generator=generator).mul_(said.hidden**-0.5)
    ids = torch.randint(0, said.vocabulary // said.topk, (said.tokens, said.topk), generator=generator)
    ids += torch.arange(said.topk) * (said.vocabulary // said.topk)  # a column each: no token twice
    logits = torch.randn(said.tokens, said.topk, generator=generator).sort(1, descending=True).values
    return x, weight, ids, logits


def dense(said: argparse.Namespace) -> Callable[[], float]:
    """The leanest plain loss: the student's whole F.log_softmax, from which the candidates are read."""
    x, weight, ids, logits = prepare(said)
    log_p = F.log_softmax(logits / TEMPERATURE, dim=1)

    def step() -> float:
        leaf = x.clone().requires_grad_()
        log_q = F.log_softmax(leaf @ weight.t() / TEMPERATURE, dim=1).gather(1, ids)
        loss = TEMPERATURE**2 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        torch.autograd.backward(loss)
        return loss.item()

    return step


def ours(said: argparse.Namespace) -> Callable[[], float]:
    """What a training step of kd-cache does behind the last block."""
    from runtimes.distill.targets import Targets
    from runtimes.train.candidates import Terms, candidate_loss
    from runtimes.train.losses import Features

    x, weight, ids, logits = prepare(said)
    count = said.tokens
    top = torch.full((count,), 20.0)
    targets = Targets(torch.arange(count), ids, logits.half(), top, ids[:, 1], said.vocabulary)
    weights = {"kl": 1.0} | ({"hard_full": 0.1} if said.worker == "full" else {})
    terms = Terms(temperature=TEMPERATURE, weights=weights)

    def step() -> float:
        leaf = x.clone().requires_grad_()
        total, _ = candidate_loss(Features(leaf, weight), targets, terms)
        torch.autograd.backward(total / count)
        return total.item()

    return step


def worker(said: argparse.Namespace) -> None:
    """Answer every line on stdin with the seconds of a step and the peak of memory above the start, in MiB."""
    from tools.bench.resident import kibibytes, mark_here

    step = dense(said) if said.worker == "dense" else ours(said)
    before = kibibytes("VmRSS")
    mark_here()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(json.dumps([time.perf_counter() - start, (kibibytes("VmHWM") - before) / 1024]), flush=True)


def compare(said: argparse.Namespace) -> dict[str, dict[str, float]]:
    """All kinds, step by step in turn; the first step of each warms up and is not timed."""
    sides = {}
    for kind in KINDS:
        command = [sys.executable, __file__, "--worker", kind, *sys.argv[1:]]
        sides[kind] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert sides[kind].stdout is not None and sides[kind].stdout.readline().strip() == "ready", kind  # type: ignore[union-attr]
    rows: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
    for _ in range(said.steps + 1):
        for kind, process in sides.items():
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            rows[kind].append(json.loads(process.stdout.readline()))
    for process in sides.values():
        process.communicate()
    found = {
        kind: {"seconds": statistics.median(row[0] for row in taken[1:]), "peak_mib": taken[-1][1]}
        for kind, taken in rows.items()
    }
    for kind in KINDS[1:]:
        found[kind]["time_ratio"] = found[kind]["seconds"] / found["dense"]["seconds"]
        found[kind]["memory_ratio"] = found[kind]["peak_mib"] / found["dense"]["peak_mib"]
    return found


def main() -> None:
    """Run and print; with --check, fail where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--topk", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--check", action="store_true", help=f"exit 1 unless the ratios reach {GOALS}")
    parser.add_argument("--worker", choices=KINDS, help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.worker:
        worker(said)
        return
    found = compare(said)
    print(json.dumps(found, indent=1))
    missed = [
        f"{kind} {what}" for kind, goals in GOALS.items() for what, goal in goals.items()
        if found[kind][f"{what}_ratio"] > goal
    ]  # fmt: skip
    if said.check and missed:
        raise SystemExit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
