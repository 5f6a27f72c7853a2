"""A training step over ternary weights behind a straight-through rounding, beside the same model's plain fp32 step.

python tools/bench/ternary_step.py [--steps 30] [--length 128] [--batch 8] [--group 64] [--check]

The model, the tokens and the turns are those of ``lut_step.py``: a random Qwen3 of 27 M weights, AdamW, gradients
clipped, one thread. ``plain`` trains all weights; ``ternary`` trains as many, those of attention and MLP behind the
rounding, with least-squares scales that are found anew at every step.
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

from tools.bench import lut_step
from tools.bench.turns import beside, put_model, serve, take_turns

GOAL = 1.15
"""CPU time of a step, over that of the plain one."""


class Step(lut_step.Step):
    """What ``qc train`` does in a step."""

    def __init__(self, kind: str, work: Path, batch: int, length: int, group: int | None):
        self.group = group
        super().__init__(kind, work, batch, length)

    def _quantize(self, graph: Any) -> None:
        from passes.runner import apply
        from passes.ternary_ste import TernarySte

        graph.materialize()
        granularity: Literal["channel", "group"] = "channel" if self.group is None else "group"
        step = TernarySte(tau=0.7, scale="least-squares", granularity=granularity, group=self.group)
        apply(step, graph, check=False)
        for name, info in graph.tensors().items():
            if info.kind == "parameter":
                graph.set_info(name, trainable=True, group="scales")


def main() -> None:
    """Run and print; with --check, fail where the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--group", type=int, help="columns that share a scale; without it, a row does")
    parser.add_argument("--check", action="store_true", help="exit 1 where CPU time misses its goal")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.worker:
        serve(lambda: Step(said.worker, said.work, said.batch, said.length, said.group))
        return
    with tempfile.TemporaryDirectory() as folder:
        put_model(Path(folder) / "model")
        arguments = ["--work", folder, "--batch", str(said.batch), "--length", str(said.length)]
        arguments += ["--group", str(said.group)] if said.group is not None else []
        taken = take_turns(__file__, ["plain", "ternary"], arguments, said.steps)
    found: dict[str, Any] = {kind: each.figures() for kind, each in taken.items()}
    found |= beside(taken["ternary"], taken["plain"])
    print(json.dumps(found, indent=1))
    if said.check and found["cpu_ratio"] > GOAL:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
