"""What an export to Core ML packages costs: a Qwen3-0.6B of random q2a4 weights, streamed from disk.

    python -m tools.bench.ane_export [--check] [--layers 28]

--check goes by the time of the processor: that of the clock is also what else the machine does.

The packed weights are written to a file first, from which the graph reads each in its turn; that is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LIMITS = {"cpu_seconds": 180.0, "rss_above_files": 2e9}
"""What --check wants of 28 layers."""


def stored_graph(work: Path, layers: int) -> Any:
    """A lazy graph of the architecture with q2a4 blocks."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen3Config

    from graph import capture
    from graph.formats import LutOptions
    from graph.weights import read_header
    from passes.quantize_base import QuantizeBase

    sizes: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 3072, "head_dim": 128, "vocab_size": 151936}
    heads: dict[str, Any] = {"num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": True}
    graph = capture(Qwen3Config(**sizes, **heads, num_hidden_layers=layers, max_position_embeddings=4096))
    QuantizeBase(scheme="lut", lut=LutOptions(preset="q2a4", train="none")).run(graph)
    graph.verify()
    generator = torch.Generator().manual_seed(0)
    for i, name in enumerate(n for n in graph.tensors() if graph.tensor(n).is_meta):
        value = _random(name, graph.shape(name), graph.dtype_of(name), generator)
        save_file({name: value}, work / f"{i}.safetensors")
        graph.stored[name] = read_header(work / f"{i}.safetensors")[name]
    return graph


def _random(name: str, shape: tuple[int, ...], dtype: Any, generator: Any) -> Any:
    """Values such as a trained weight has: bytes are any, levels go up."""
    import torch

    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=dtype, generator=generator)
    if name.endswith(".lut"):
        return torch.linspace(-1, 1, shape[-1]).expand(shape).contiguous().to(dtype)
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=dtype)
    return torch.randn(shape, generator=generator).mul_(0.02).to(dtype)


def measure(work: Path, layers: int) -> dict[str, float]:
    """Seconds, bytes written, and the most memory that was held at any time."""
    import resource

    from runtimes.ane.mil import coremltools
    from runtimes.export.ane import export

    graph = stored_graph(work, layers)
    coremltools()
    before = _resident()
    start, busy = time.perf_counter(), time.process_time()
    report = export(graph, work / "out", context=512, prefill=64, calibration=0)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    written = sum(size for name, size in report.files.items() if name.endswith("weight.bin"))
    expected = float(report.figures["weight_bytes"])
    return {
        "seconds": seconds,
        "cpu_seconds": busy,
        "rss_bytes": float(peak),
        "rss_before": float(before),
        "rss_above_files": peak - written,
        "weight_bytes": float(written),
        "over_the_formula": written / expected - 1,
    }


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> int:
    """Measure in a fresh process, whose peak is its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--check", action="store_true", help="fail where a limit is broken")
    parser.add_argument("--in", dest="work", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        print(json.dumps(measure(Path(given.work), given.layers)))
        return 0
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, "-m", "tools.bench.ane_export", "--in", work, "--layers", str(given.layers)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return 1
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    for key, value in found.items():
        print(f"{key:<18}{value:>16.4g}")
    broken = [key for key, limit in LIMITS.items() if found[key] > limit]
    for key in broken if given.check else ():
        print(f"{key} is more than {LIMITS[key]:g}", file=sys.stderr)
    return 1 if given.check and broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
