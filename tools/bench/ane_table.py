"""The table of docs/ane.md: what exports for the Neural Engine compute and weigh, each read back by the interpreter.

python -m tools.bench.ane_table [--only NAME ...] [--write]

Every row is an export with the default options, verified as ``qc verify`` does, against the graph with the same
weights. With --write the table goes into docs/ane.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from graph import Graph, capture
from graph.checkpoint import locate
from graph.tokenizer import load_tokenizer
from tools.bench.tables import replace_table
from tools.minilm import minilm

LEAST = 0.98
"""Rank correlation of the similarities of a 4-bit MiniLM with those of the model that was quantized."""


@dataclass(frozen=True)
class Case:
    """A model in one form of weights."""

    source: Callable[[], Path]
    quantize: dict[str, Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)


LUT4: dict[str, Any] = {"scheme": "lut", "bits": 4, "scale": "channel"}
CASES = {
    "seedling, fp16": Case(partial(locate, "seedling")),
    "seedling, LUT4": Case(partial(locate, "seedling"), LUT4),
    "seedling, q2a4": Case(partial(locate, "seedling"), {"scheme": "lut", "preset": "q2a4", "group": 8}),
    "seedling, int8": Case(partial(locate, "seedling"), {"scheme": "int8"}),
    "MiniLM, fp16": Case(minilm, options={"lengths": (32, 128)}),
    "MiniLM, LUT4": Case(minilm, LUT4, options={"lengths": (32, 128)}),
}

HEAD = ("model", "PSNR fp32", "fp16", "ane", "top-1 fp32", "greedy tokens", "ranking fp16", "weights", "formula")


def row(name: str) -> list[str]:
    """Export, verify, weigh; raises where the verification fails."""
    from runtimes.export.ane import export
    from runtimes.verify import verify

    case = CASES[name]
    source = case.source()
    graph = capture(source) if case.quantize is None else _quantized(capture(source), **case.quantize)
    tokenizer = load_tokenizer(source, name)
    with tempfile.TemporaryDirectory() as work:
        report = export(graph, Path(work) / "out", tokenizer=source, **case.options)
        found = verify(Path(work) / "out", graph, tokenizer=tokenizer)
        print(found.table(), file=sys.stderr)
        if not found.passed:
            raise SystemExit(f"{name} is not what its graph is")
        alike = _alike(Path(work) / "out", source, tokenizer) if graph.kind == "encoder" else None
    written = sum(size for file, size in report.files.items() if file.endswith("weight.bin"))
    expected = float(report.figures["weight_bytes"])
    numbers = found.figures()
    db = [f"{numbers[f'{mode}/psnr_db']:.1f} dB" for mode in ("fp32", "fp16", "ane")]
    greedy = "{greedy/same} of {greedy/prompts} x {greedy/tokens} the same"
    same = greedy.format_map(numbers) if alike is None else ""
    ranks = "" if alike is None else f"{alike:.4f}"
    top1 = f"{numbers['fp32/top1']:.2%}" if alike is None else ""
    return [name, *db, top1, same, ranks, f"{written:,}", f"{written / expected - 1:+.2%}"]


def _quantized(graph: Graph, scheme: Any, **options: Any) -> Graph:
    """In so few bits; levels and scales as a device holds them, in fp16, as recipes leave them before an export."""
    from graph import Selector
    from graph.formats import LutOptions
    from passes.quantize_base import QuantizeBase
    from passes.runner import apply
    from passes.snap import Snap

    if scheme != "lut":
        apply(QuantizeBase(scheme=scheme, **options), graph, check=False)
        return graph
    apply(QuantizeBase(scheme="lut", lut=LutOptions(**options)), graph, check=False)
    apply(Snap(select=Selector(name=("*.weight.lut", "*.weight.scale*"))), graph, check=False)
    return graph


def _alike(folder: Path, source: Path, tokenizer: Any) -> float:
    """How the export, in fp16, ranks fifty pairs of sentences, against the model before it was quantized."""
    import torch

    from runtimes.coreml.encoder import Encoder, pooling
    from runtimes.verify.similarities import sentence_rows, similarities, spearman

    original, ours = capture(source, dtype=torch.float32), Encoder(folder, "fp16")

    def hidden(ids: Any) -> Any:
        with torch.no_grad():
            return original(input_ids=torch.tensor([ids]))[0]

    rows = sentence_rows(tokenizer, ours.lengths[-1])
    found = spearman(similarities(hidden, pooling(source), rows), similarities(ours.hidden, ours.pool(), rows))
    if found < LEAST:
        raise SystemExit(f"sentences are ranked otherwise: {found:.4f}")
    return found


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--write", action="store_true", help="put the table into docs/ane.md")
    given = parser.parse_args()
    lines = []
    for cells in chain((HEAD, ["---"] * len(HEAD)), map(row, given.only)):
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    if given.write:
        replace_table("figures", "\n".join(lines), page="ane.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
