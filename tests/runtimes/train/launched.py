"""What each process of a launched training runs: ``python -m tests.runtimes.train.launched FOLDER BATCH SETTINGS``."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from runtimes.train import Silent, train
from runtimes.train.trainer import Step, Trainer
from tests.runtimes.data.byte_tokenizer import byte_tokenizer
from tests.runtimes.train.tiny import corpus, settings, tiny_graph


def end_before(step: int) -> None:
    """Make every process end where it would take this step."""
    take = Trainer.step

    def step_or_end(trainer: Trainer, number: int, first_row: int) -> Step:
        if number == step:
            os._exit(0)
        return take(trainer, number, first_row)

    Trainer.step = step_or_end  # type: ignore[method-assign, assignment]


def main(folder: Path, batch: int, stop: int | None = None, **changes: Any) -> None:
    """Train with two forward passes a step on the corpus beside the folder."""
    torch.set_num_threads(1)
    if stop is not None:
        end_before(stop)
    data = corpus(folder.parent / "text")
    chosen = settings(data, batch=batch, accumulate=2, eval_every=2, save_every=2, **changes)
    report = train(tiny_graph(), chosen, tokenizer=byte_tokenizer(), folder=folder, progress=Silent())
    if os.environ.get("RANK", "0") == "0":
        (folder / "report.json").write_text(json.dumps(asdict(report), default=str))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), **json.loads(sys.argv[3]))
