"""What is left of a float training once its weights are ternary again: the table in docs/ternary.md, on the seedling.

python tools/ternary_return.py [--recover 150] [--floats 200] [--again 100] [--text headers] [--seed 0] [--write]

Ternary weights are recovered by --recover steps and packed; handed over as floats, trained with all else for --floats
steps on the next token of --text; made ternary again in three ways, and trained behind the rounding for --again
steps, by what the float model says of the same text. The headers are those of C++ that come with torch, which the
seedling has never seen: something to learn. The standard library is what it was trained on: all that there is to gain
is what rounding cost.
Everything is measured on held-out files of --text. With --write the table goes into docs/ternary.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from graph import Graph, Selector, capture
from graph.checkpoint import locate
from passes.freeze_ternary import FreezeTernary
from passes.hand_off import HandOff
from passes.requantize_ternary import RequantizeTernary
from passes.runner import apply
from passes.set_trainable import SetTrainable
from passes.ternary_ste import TernarySte
from runtimes.data.corpus import Corpus
from runtimes.evaluate import evaluate
from runtimes.settings import Data, Group, Kd, PythonStdlib, TextFiles, Train
from runtimes.train import Silent, train

BATCHES, BATCH, LENGTH = 16, 8, 128
RULE: dict[str, Any] = {"tau": 0.7, "scale": "least-squares", "granularity": "group", "group": 64}
NAIVE = RULE | {"scale": "absmean"}
STORED = {key: value for key, value in RULE.items() if key != "scale"}
GOAL = 0.9
"""The share of what the float training gained that shall be left."""

TRAINED = ("naive", "least-squares")
"""The ways that are followed by steps behind the rounding."""


@dataclass
class Study:
    """The figures of one way there and back."""

    text: Data
    seed: int
    work: Path
    found: dict[str, float] = field(default_factory=dict)
    """Perplexity by what the model is."""

    def note(self, name: str, graph: Graph) -> None:
        """Measure the graph under this name."""
        rows = Corpus(self.text).rows(
            "heldout", tokenizer=self.tokenizer, length=LENGTH, cache=self.work / "tokens", seed=0,
            enough=BATCHES * BATCH * LENGTH,
        )  # fmt: skip
        starts = range(0, min(len(rows), BATCHES * BATCH), BATCH)
        batches = (rows.batch(list(range(start, min(start + BATCH, len(rows))))) for start in starts)
        self.found[name] = float(evaluate(graph, batches, metrics=["perplexity"])["perplexity"])
        print(f"{name}: {self.found[name]:.3f}", file=sys.stderr, flush=True)

    @property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(locate("seedling"))

    def train(self, graph: Graph, text: Data, steps: int, lr: float, teacher: Graph | None = None) -> None:
        """Train what is trainable, by the teacher if there is one."""
        wanted: dict[str, Any] = {"objective": Kd(temperature=2.0)} if teacher is not None else {}
        chosen = Train(
            data=text, steps=steps, batch=BATCH, length=LENGTH, plot=False, eval_batches=1, **wanted,
            groups={"weights": Group(lr=lr, warmup=0.1, min_lr_ratio=0.05)},
        )  # fmt: skip
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            train(
                graph, chosen, tokenizer=self.tokenizer, folder=Path(folder), teacher=teacher, seed=self.seed,
                cache=self.work / "tokens", progress=Silent(),
            )  # fmt: skip


def own_copy(graph: Graph) -> Graph:
    """A copy with tensors of its own."""
    copy = graph.copy()
    for name in copy.tensors():
        copy.set_tensor(name, copy.tensor(name).detach().clone())
    return copy


def run(study: Study, recover: int, floats: int, again: int) -> None:
    """There and back."""
    full = capture("seedling")
    full.materialize()
    study.note("FP16", full)
    graph = capture("seedling")
    graph.materialize()
    apply(TernarySte(**RULE), graph, check=False)
    study.train(graph, PythonStdlib(), recover, 2e-3, full)
    apply(FreezeTernary(), graph, check=False)
    study.note("packed", graph)
    apply(HandOff(), graph, check=False)
    apply(SetTrainable(groups={"weights": Selector(name=("*",))}), graph, check=False)
    study.train(graph, study.text, floats, 5e-4)
    study.note("floats", graph)
    ways = {"naive": NAIVE | {"start": "plain"}, "stored": STORED, "least-squares": RULE | {"start": "plain"}}
    for name, options in ways.items():
        copy = own_copy(graph)
        apply(RequantizeTernary(**options), copy, check=False)
        study.note(f"{name}, at once", copy)
        if name in TRAINED:
            study.train(copy, study.text, again, 1e-3, graph)
            study.note(f"{name}, trained", copy)


def table(found: Mapping[str, float], recover: int, floats: int, again: int, text: str) -> str:
    """One line for each model, with what it keeps of the float training's gain."""
    gain = found["packed"] - found["floats"]
    lines = [f"| {text} | steps | perplexity | of the gain |", "|---|---|---|---|"]
    lines.append(f"| FP16, never trained on it | | {found['FP16']:.2f} | |")
    lines.append(f"| ternary, packed | {recover} | {found['packed']:.2f} | 0 % |")
    lines.append(f"| floats | {floats} | {found['floats']:.2f} | 100 % |")
    for name in ("naive", "stored", "least-squares"):
        for when, steps in (("at once", 0), ("trained", again)):
            if f"{name}, {when}" in found:
                here = found[f"{name}, {when}"]
                kept = (found["packed"] - here) / gain
                lines.append(f"| ternary again, {name} | {steps} | {here:.2f} | {kept:.0%} |")
    kept = (found["packed"] - found["least-squares, trained"]) / gain
    return "\n".join([*lines, "", f"{kept:.0%} of the gain is left; the goal is {GOAL:.0%}."])


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recover", type=int, default=150)
    parser.add_argument("--floats", type=int, default=200)
    parser.add_argument("--again", type=int, default=100)
    parser.add_argument("--text", choices=["headers", "stdlib"], default="headers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="put the table into docs/ternary.md")
    said = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        study = Study(_text(said.text), said.seed, Path(work))
        run(study, said.recover, said.floats, said.again)
    made = table(study.found, said.recover, said.floats, said.again, said.text)
    print(made)
    if said.write:
        from tools.bench.tables import replace_table

        replace_table(f"ternary-return-{said.text}", made, page="ternary.md")


def _text(name: str) -> Data:
    """The text by its name."""
    if name == "stdlib":
        return PythonStdlib()
    import torch

    return TextFiles(text=str(Path(torch.__file__).parent / "include/c10/**/*.h"))


if __name__ == "__main__":
    main()
