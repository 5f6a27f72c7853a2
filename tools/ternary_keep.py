"""The table of docs/ternary.md on what stays as it is: chosen by importance, at random, or at the ends, in equal bytes.

python tools/ternary_keep.py [--shares 0.1 0.2 0.3] [--seeds 8] [--batches 8] [--write]

The seedling, attention and MLP rounded by the rule of `recipes/ternary.yaml`, without training. Every row keeps
whole linears as long as they fit the same budget; all are measured on the same held-out files. `importance` is what
`keep` does: the error that a kept byte avoids. `error alone` does not count bytes, `smallest` nothing but bytes,
`first` keeps linears in the model's order, and `ends` from both ends of the model inwards.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from graph import Graph, Selector, capture  # noqa: E402
from graph.checkpoint import locate  # noqa: E402
from graph.importance import Candidate, within  # noqa: E402
from graph.tokenizer import load_tokenizer  # noqa: E402
from passes.base import Weighed  # noqa: E402
from passes.calibrate import Calibrate  # noqa: E402
from passes.keeping import Keep  # noqa: E402
from passes.runner import apply  # noqa: E402
from passes.ternary_ste import TernarySte  # noqa: E402
from runtimes.data.corpus import Corpus  # noqa: E402
from runtimes.evaluate import evaluate  # noqa: E402
from runtimes.settings import PythonStdlib  # noqa: E402

LENGTH, ROWS, TOKENS = 128, 8, 16384
ENOUGH = 65536
"""Tokens that are made of each split, and more than are read."""
TERNARY: dict[str, Any] = {"tau": 0.7, "scale": "least-squares", "granularity": "group", "group": 64}


@dataclass(frozen=True)
class Found:
    """What came of one choice."""

    kept: int
    """Values that stay."""

    perplexity: float


@cache
def _rows(split: Any) -> Any:
    tokenizer = load_tokenizer(locate("seedling"), "seedling")
    return Corpus(PythonStdlib()).rows(
        split, tokenizer=tokenizer, length=LENGTH, cache=Path("runs/.cache/tokens"), enough=ENOUGH
    )


def batches(split: str, count: int) -> Iterator[Any]:
    """So many batches of a split, always the same."""
    rows = _rows(split)
    for first in range(0, min(count * ROWS, len(rows)), ROWS):
        yield rows.batch(range(first, min(first + ROWS, len(rows))))


def read(data: Any, tokens: int, length: int, batch: int) -> Iterator[Mapping[str, Any]]:
    """The text of ``calibrate``: the first rows that are trained on."""
    return (one.inputs() for one in batches("train", tokens // (length * batch)))


@cache
def calibrated() -> Graph:
    """The seedling, and what its linears read; to be copied."""
    graph = capture("seedling", dtype=torch.float32).materialize()
    apply(Calibrate(data=PythonStdlib(), tokens=TOKENS, length=LENGTH, batch=ROWS).reading(read), graph, check=False)
    return graph


def measured(exclude: Sequence[str], count: int) -> Found:
    """The figures with these weights left as they are."""
    graph = calibrated().copy()
    values = sum(graph.tensor(name).numel() for name in exclude)
    left = tuple(name.removesuffix(".weight") for name in exclude)
    chosen = Selector(role=("attn.*", "mlp.*"), exclude=left or None)
    apply(TernarySte(select=chosen, **TERNARY), graph, check=False)
    return Found(values, evaluate(graph, batches("heldout", count))["perplexity"])


def orders(weighed: Sequence[Weighed], seeds: int) -> dict[str, list[list[Weighed]]]:
    """In which order weights are kept, by the name of the choice; of random ones there are several."""
    first = list(weighed)
    ends = sorted(first, key=lambda one: min(first.index(one), len(first) - 1 - first.index(one)))
    smallest = sorted(first, key=lambda one: one.values)
    by_error = sorted(first, key=lambda one: -(one.error or 0.0))
    by_worth = sorted(first, key=lambda one: -(one.error or 0.0) / one.values)
    shuffled = []
    for seed in range(seeds):
        order = torch.randperm(len(first), generator=torch.Generator().manual_seed(seed)).tolist()
        shuffled.append([first[at] for at in order])
    found = {"importance": by_worth, "error alone": by_error, "smallest": smallest, "first": first, "ends": ends}
    return {**{name: [order] for name, order in found.items()}, "random": shuffled}


def filled(order: Sequence[Weighed], budget: float) -> list[str]:
    """The weights of an order that fit the budget, by the same rule as ``keep``."""
    ranked = [Candidate((one.weight,), one.values, one.values * (len(order) - at)) for at, one in enumerate(order)]
    return [name for one in within(ranked, budget) for name in one.names]


def rows_of(share: float, seeds: int, count: int) -> dict[str, list[Found]]:
    """Every choice within one budget."""
    weighed = apply(TernarySte(**TERNARY, keep=Keep(share=share)), calibrated().copy(), check=False).weighed
    budget = share * sum(one.values for one in weighed)
    found: dict[str, list[Found]] = {}
    for name, several in orders(weighed, seeds).items():
        chosen = [filled(order, budget) for order in several]
        if name == "importance":
            assert set(chosen[0]) == {one.weight for one in weighed if one.kept}, "the pass chooses otherwise"
        found[name] = [measured(names, count) for names in chosen]
        _tell(f"{share:.0%} {name}: " + " ".join(f"{one.perplexity:.2f}" for one in found[name]))
    return found


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def table(found: Mapping[float, Mapping[str, Sequence[Found]]], none: Found) -> str:
    """A line for each budget and choice; of random ones the mean, and the range between them."""
    lines = ["| may stay | chosen by | values that stay | perplexity |", "|---|---|---|---|"]
    lines.append(f"| 0 % | | 0 | {none.perplexity:.2f} |")
    for share, choices in found.items():
        for name, several in choices.items():
            said = [_said([read_(one) for one in several], form) for read_, form in _COLUMNS]
            lines.append(f"| {share:.0%} | {name} | {' | '.join(said)} |")
    return "\n".join(lines)


_COLUMNS: tuple[tuple[Callable[[Found], float], str], ...] = (
    (lambda one: one.kept, ",.0f"),
    (lambda one: one.perplexity, ".2f"),
)


def _said(values: Sequence[float], form: str) -> str:
    mean = format(statistics.fmean(values), form)
    low, high = format(min(values), form), format(max(values), form)
    return mean if low == high else f"{mean} ({low} to {high})"


def main() -> None:
    """Measure all and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    parser.add_argument("--seeds", type=int, default=8, help="random choices for each budget")
    parser.add_argument("--batches", type=int, default=8, help="held-out batches of 1,024 tokens")
    parser.add_argument("--write", action="store_true", help="put the table into docs/ternary.md")
    said = parser.parse_args()
    none = measured((), said.batches)
    found = {share: rows_of(share, said.seeds, said.batches) for share in said.shares}
    print(table(found, none))
    if said.write:
        from tools.bench.tables import replace_table

        replace_table("ternary-keep", table(found, none), page="ternary.md")


if __name__ == "__main__":
    main()
