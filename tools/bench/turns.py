"""Steps of several sides, each in a process of its own, taken in turn: a busy machine slows all of them alike.

A side is an object with ``step(number) -> loss``. A bench file calls ``serve`` with what makes one where it was started
with ``--worker``, else ``take_turns``.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tools.bench.resident import kibibytes, mark_here

ROOT = Path(__file__).resolve().parent.parent.parent

VOCABULARY = 4096
"""Of the models: the seedling's, so that its tokens serve both."""

WARM = 2
"""Steps at the beginning that are not timed."""


class Side(Protocol):
    """What is timed."""

    def step(self, number: int) -> float:
        """Take the training step of this number; its loss."""


@dataclass(frozen=True)
class Taken:
    """The steps of one side."""

    losses: list[float]
    seconds: list[float]
    cpu_seconds: list[float]
    """Of the process, over all its threads."""

    peak_mib: float
    """The high-water mark of the resident set from the first step on; the whole process counts."""

    def figures(self) -> dict[str, float]:
        """What a report shows of it."""
        return {
            "step_s": statistics.median(self.seconds),
            "step_min_s": min(self.seconds),
            "cpu_s": statistics.median(self.cpu_seconds),
            "cpu_min_s": min(self.cpu_seconds),
            "peak_mib": self.peak_mib,
        }


def beside(one: Taken, other: Taken) -> dict[str, float]:
    """What a step of the one costs in parts of the other's, and how far apart their losses are."""
    return {
        "time_ratio": ratio(one.seconds, other.seconds),
        "time_ratio_min": min(one.seconds) / min(other.seconds),
        "cpu_ratio": ratio(one.cpu_seconds, other.cpu_seconds),
        "cpu_ratio_min": min(one.cpu_seconds) / min(other.cpu_seconds),
        "memory_ratio": one.peak_mib / other.peak_mib,
        "largest_loss_gap": max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True)),
    }


def put_model(folder: Path, kind: str = "25m") -> None:
    """A model at ``folder``: a random Qwen3 of 27 M weights for ``25m``, else a link to the one that is named."""
    if kind != "25m":
        from graph.checkpoint import locate

        folder.symlink_to(locate(kind))
        return
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4, head_dim=64,
        intermediate_size=1536, vocab_size=VOCABULARY, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def ratio(one: Sequence[float], other: Sequence[float]) -> float:
    """The median of the ratios of steps taken beside each other."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


class Training:
    """The step of ``qc train`` on tokens that are given: next-token loss, gradients clipped, the optimizer."""

    def __init__(self, student: Any, optimizer: Any):
        from runtimes.train.objectives import next_token

        self.student, self.optimizer, self.loss = student, optimizer, next_token

    def step(self, tokens: Tensor) -> float:
        """tokens: [batch, length]  ->  the loss."""
        from runtimes.data import Batch

        labels = torch.full_like(tokens, -100)
        labels[:, :-1] = tokens[:, 1:]
        batch = Batch(tokens, torch.ones_like(tokens), labels)
        loss = self.loss(self.student(batch, training=True), batch) / (labels >= 0).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(self.student.parameters.values()), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.item())


def serve(make_side: Callable[[], Side]) -> None:
    """Take a step for every number on stdin; answer with loss, seconds, CPU seconds and the memory's peak."""
    side = make_side()
    mark_here()  # loading does not count
    print("ready", flush=True)
    for line in sys.stdin:
        start, cpu = time.perf_counter(), time.process_time()
        loss = side.step(int(line))
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
        print(json.dumps([loss, seconds, cpu_seconds, kibibytes("VmHWM") / 1024]), flush=True)


def take_turns(bench: str, kinds: Sequence[str], arguments: Sequence[str], steps: int) -> dict[str, Taken]:
    """So many steps of each kind of side that the file ``bench`` knows: step 0 of all, then step 1, and so on."""
    sides = {
        kind: subprocess.Popen(
            [sys.executable, bench, "--worker", kind, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for kind in kinds
    }
    for kind, process in sides.items():
        assert process.stdout is not None
        while process.stdout.readline().strip() != "ready":
            assert process.poll() is None, f"{kind} could not start"
    rows: dict[str, list[list[float]]] = {kind: [] for kind in sides}
    for step in range(steps + WARM):
        for kind, process in sides.items():
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(f"{step}\n")
            process.stdin.flush()
            rows[kind].append(json.loads(process.stdout.readline()))
    for process in sides.values():
        process.communicate()
    return {kind: _taken(each) for kind, each in rows.items()}


def _taken(rows: list[list[float]]) -> Taken:
    timed = rows[WARM:]
    return Taken([r[0] for r in rows], [r[1] for r in timed], [r[2] for r in timed], rows[-1][3])
