"""Sizes of ONNX exports of the seedling and what ONNX Runtime makes of them, beside the formula and the graph.

python tools/bench/onnx_export.py [--only int4,lut] [--write]

Each row is an export, verified in a fresh process as ``qc verify`` does; --write puts the table into docs/onnx.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from graph import Graph, capture
from graph.checkpoint import locate
from graph.formats import LutOptions
from graph.tokenizer import load_tokenizer
from passes.quantize_base import QuantizeBase
from passes.runner import apply
from runtimes.export.onnx import export
from runtimes.verify.onnx import verify_onnx
from tools.bench.tables import replace_table

CASES: dict[str, dict[str, Any] | None] = {
    "float": None,
    "int8": {"scheme": "int8"},
    "int4": {"scheme": "int4"},
    "fp8": {"scheme": "fp8"},
    "nf4": {"scheme": "nf4"},
    "lut": {"scheme": "lut", "lut": LutOptions(preset="q2a4", group=8)},
}
HEAD = """| weights | dtype | bytes | off the formula | max difference | by itself |
| --- | --- | --- | --- | --- | --- |"""


def main() -> None:
    """Run and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="weights, comma-separated; without it all")
    parser.add_argument("--write", action="store_true", help="put the table into docs/onnx.md")
    said = parser.parse_args()
    rows = [HEAD]
    print(HEAD, flush=True)
    for name in said.only.split(",") if said.only else CASES:
        graph = capture("seedling")
        options = CASES[name]
        if options is not None:
            apply(QuantizeBase(**options), graph, check=False)
        for dtype in ("fp32", "fp16"):
            rows.append(_row(graph, name, dtype))
            print(rows[-1], flush=True)
    if said.write:
        replace_table("onnx", "\n".join(rows), page="onnx.md")


def _row(graph: Graph, name: str, dtype: Any) -> str:
    source = Path(locate("seedling"))
    with tempfile.TemporaryDirectory(prefix="qc-onnx-") as temporary:
        report = export(graph, Path(temporary) / "out", dtype=dtype, source=source)
        tokenizer = load_tokenizer(source, "the seedling")
        verified = verify_onnx(report.folder, graph, tokenizer=tokenizer)
        size = sum(report.files[file] for file in report.files if file.startswith("model.onnx"))
    if not verified.passed:
        raise SystemExit(f"{name} in {dtype} is not its graph:\n{verified.table()}")
    numbers = verified.numbers
    most = max(numbers["max_difference"], numbers["text/max_difference"])
    loose = f"{numbers['loose/psnr_db']:.0f} dB, {numbers['loose/top1']:.1%}" if "loose/psnr_db" in numbers else ""
    return f"| {name} | {dtype} | {size:,} | {numbers['size_off']:+.2%} | {most:.1e} | {loose} |"


if __name__ == "__main__":
    main()
