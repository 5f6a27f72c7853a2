"""Trains once undisturbed and once with kills, and prints what both came to.

``python -m tests.runtimes.train.killed FOLDER KILLS SEED``. Every attempt is a process of its own, forked from this
one so that torch is imported once, and killed with SIGKILL a random moment after a random step (or while it starts).
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from graph.hashes import tensor_sha256
from runtimes.settings import Group
from runtimes.train.metrics import read
from tests.runtimes.train.tiny import corpus, run, settings, tiny_graph

STEPS_A_KILL = 6


def attempt(folder: Path, steps: int) -> None:
    """Train, from wherever the folder stands, to the end, and write down what came out."""
    groups = {"down": Group(lr=1e-2, select={"role": "mlp.down"}, start_step=5, warmup=3), "rest": Group(lr=3e-3)}
    data = corpus(folder.parent / "text")
    chosen = settings(data, steps=steps, lr=None, groups=groups, ema=0.8, save_every=2, eval_every=5, accumulate=2)
    graph = tiny_graph()
    run(graph, chosen, folder)
    said = {name: tensor_sha256(graph.tensor(name)) for name in graph.tensors()}
    (folder / "said.json").write_text(json.dumps(said))


def forked(folder: Path, steps: int) -> int:
    """Start an attempt; the number of its process."""
    process = os.fork()
    if process == 0:
        try:
            attempt(folder, steps)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    return process


def reached(folder: Path) -> int:
    """The last step that the metrics of a running training show."""
    rows = read(folder)
    return int(rows[-1]["step"]) if rows else 0


def outcome(folder: Path) -> dict[str, object]:
    """All that must not depend on kills."""
    last = folder / "checkpoints" / "last"
    hashes = json.loads((last / "state.json").read_text())["sha256"]
    left = sorted(p.name for p in (folder / "checkpoints").iterdir())
    losses = [{k: v for k, v in row.items() if "seconds" not in k and "second" not in k} for row in read(folder)]
    return {"hashes": hashes, "graph": json.loads((folder / "said.json").read_text()), "rows": losses, "left": left}


def main(folder: Path, kills: int, seed: int) -> None:
    """Print both outcomes as JSON."""
    torch.set_num_threads(1)
    tiny_graph()
    chance, steps = random.Random(seed), STEPS_A_KILL * kills
    calm, rough = folder / "calm", folder / "rough"
    assert os.waitpid(forked(calm, steps), 0)[1] == 0
    for kill in range(kills):
        process = forked(rough, steps)
        if chance.random() < 0.2:
            time.sleep(chance.uniform(0, 0.3))
        else:
            goal = kill * STEPS_A_KILL + chance.randrange(STEPS_A_KILL - 1)
            while reached(rough) < goal:
                assert os.waitpid(process, os.WNOHANG) == (0, 0), f"it ended before step {goal}"
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.05))
        os.kill(process, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(process, 0)[1]), "it was over before it could be killed"
    assert os.waitpid(forked(rough, steps), 0)[1] == 0
    print(json.dumps({"calm": outcome(calm), "rough": outcome(rough)}))  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
