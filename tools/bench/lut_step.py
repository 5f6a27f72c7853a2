"""A training step over LUT weights with low-rank scales, beside the same model's plain fp32 step: CPU time and memory.

python tools/bench/lut_step.py [--steps 30] [--length 128] [--batch 8] [--rank-loop] [--check]

A random Qwen3 of 27 M weights on random tokens, AdamW, gradients clipped, one thread. ``plain`` trains all weights;
``lut`` has 2 bits in the MLP and 4 in attention, all with scales of rank 32, which train; ``rank-loop`` is that with
the factored form, one multiplication a rank. All take their steps in turn, in processes of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch

from tools.bench.turns import VOCABULARY, Training, beside, put_model, serve, take_turns


class Step:
    """What ``qc train`` does in a step."""

    def __init__(self, kind: str, work: Path, batch: int, length: int):
        from graph import capture
        from runtimes.settings import Group, PythonStdlib, Train
        from runtimes.train.distribute import Processes
        from runtimes.train.groups import members, optimizer
        from runtimes.train.student import Student

        graph = capture(str(work / "model"), dtype=torch.float32)
        if kind == "plain":
            graph.materialize()
            for name, info in graph.tensors().items():
                if info.kind == "parameter":
                    graph.set_info(name, trainable=True, group="scales")
        else:
            self._quantize(graph)
        settings = Train(data=PythonStdlib(), steps=1, groups={"scales": Group(lr=1e-4, schedule="constant")})
        student = Student(graph, settings, Processes(work, ()))
        if kind == "rank-loop":
            _by_rank(student.module)
        self.training = Training(student, optimizer(members(graph, settings), student.parameters, graph, "adamw"))
        self.shape = (batch, length)

    def _quantize(self, graph: Any) -> None:
        from graph import Selector
        from graph.formats.lut_options import LutOptions
        from passes.quantize_base import QuantizeBase
        from passes.runner import apply

        sizes: tuple[tuple[str, Literal[2, 4]], ...] = (("mlp.*", 2), ("attn.*", 4))
        for role, bits in sizes:
            lut = LutOptions(bits=bits, rank=32, group=16, fit="absmax", train="scales")
            apply(QuantizeBase(scheme="lut", lut=lut, select=Selector(role=(role,))), graph, check=False)
        graph.materialize()

    def step(self, number: int) -> float:
        """One step on random tokens."""
        tokens = torch.randint(0, VOCABULARY, self.shape, generator=torch.Generator().manual_seed(number))
        return self.training.step(tokens)


def _by_rank(module: Any) -> None:
    """Turn every fused linear into the factored form."""
    from graph.formats.lut_linear import linear_lut, linear_lut_factored

    fused = [node for node in module.graph.nodes if node.target is linear_lut]
    assert fused, "no fused linear to turn"
    for node in fused:
        x, indices, lut, columns, _ = node.args
        said = node.kwargs
        node.target = linear_lut_factored
        node.args = (x, indices, lut, columns, said["scale_a"], said["scale_b"], said["scale_g"])
        node.kwargs = {}
    module.recompile()


def main() -> None:
    """Run and print; with --check, fail where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rank-loop", action="store_true", help="the factored form too, which is slow")
    parser.add_argument("--check", action="store_true", help="exit 1 where CPU time or memory misses its goal")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.worker:
        serve(lambda: Step(said.worker, said.work, said.batch, said.length))
        return
    kinds = ["plain", "lut", *(["rank-loop"] if said.rank_loop else [])]
    with tempfile.TemporaryDirectory() as folder:
        put_model(Path(folder) / "model")
        arguments = ["--work", folder, "--batch", str(said.batch), "--length", str(said.length)]
        taken = take_turns(__file__, kinds, arguments, said.steps)
    found: dict[str, Any] = {kind: each.figures() for kind, each in taken.items()}
    found |= beside(taken["lut"], taken["plain"])
    if said.rank_loop:
        found["to_rank_loop"] = beside(taken["lut"], taken["rank-loop"])
    print(json.dumps(found, indent=1))
    goal = 1.1 if said.batch * said.length >= 1024 else 1.4
    good = found["cpu_ratio"] <= goal and found["memory_ratio"] <= 0.9
    if said.check and not (good and (not said.rank_loop or found["to_rank_loop"]["cpu_ratio"] <= 0.08)):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
