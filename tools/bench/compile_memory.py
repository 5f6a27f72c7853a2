"""Peak memory of a compile that never holds the dense model, and the time of the same compile taken from its cache.

python tools/bench/compile_memory.py [--layers 28] [--work FOLDER] [--check]

A random Qwen3 of 1.7 billion weights (28 layers) is written to disk as bf16 shards, one tensor at a time, and compiled
to NF4 by `qc compile` in a process of its own. The peak is that process's high-water mark of resident memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
ALLOWANCE = 1.5e9
"""Bytes that a compile may take beside the compiled weights."""


def write_model(folder: Path, layers: int) -> int:
    """A sharded checkpoint of random weights; its number of weights."""
    import torch
    from transformers import Qwen3Config

    from graph import capture
    from graph.weights import Entry, write

    config = Qwen3Config(
        hidden_size=2048, num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
        intermediate_size=6144, vocab_size=151936, tie_word_embeddings=True, architectures=["Qwen3ForCausalLM"],
    )  # fmt: skip
    plan = capture(config, dtype=torch.bfloat16)
    names = [name for name, info in plan.tensors().items() if info.saved]

    def random(name: str) -> torch.Tensor:
        shape = plan.shape(name)
        value = torch.empty(shape, dtype=torch.bfloat16)
        return value.fill_(1.0) if len(shape) == 1 else value.normal_(0, 0.02)

    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    shapes = {name: plan.shape(name) for name in names}
    write(
        folder,
        (Entry(n, shapes[n], torch.bfloat16, lambda n=n: random(n)) for n in names),  # type: ignore[misc]
        stem="model",
        max_shard=1 << 30,
    )
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def compile_once(work: Path) -> dict[str, float]:
    """`qc compile` in a process of its own: seconds, and its peak in bytes."""
    code = (
        "import resource, sys\n"
        "from qc.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    start = time.perf_counter()
    command = [sys.executable, "-c", code, "compile", str(work / "nf4.yaml"), "--runs", str(work / "runs")]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return {"seconds": time.perf_counter() - start, "peak_bytes": int(done.stdout.split()[-1]) * 1024}


def main() -> None:
    """Run and print; with --check, fail where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--work", type=Path, help="a folder to keep the model in; without it, a temporary one")
    parser.add_argument("--check", action="store_true", help="exit 1 unless peak and cached time keep the goals")
    said = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = said.work or Path(temporary)
        if not (work / "model").is_dir():
            code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tools.bench.compile_memory import write_model;"
            code += f"from pathlib import Path; print(write_model(Path({str(work / 'model')!r}), {said.layers}))"
            subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        (work / "nf4.yaml").write_text(
            "model: ./model\ndtype: bf16\npasses:\n  - quantize-base: {scheme: nf4, double_quant: true}\n"
        )
        first, again = compile_once(work), compile_once(work)
        weights = sum(p.stat().st_size for p in (work / "runs").rglob("weights*.safetensors"))
        found: dict[str, Any] = {
            "on_disk_bytes": sum(p.stat().st_size for p in (work / "model").glob("*.safetensors")),
            "compiled_bytes": weights, "peak_bytes": first["peak_bytes"], "seconds": first["seconds"],
            "beside_the_weights": first["peak_bytes"] - weights, "cached_seconds": again["seconds"],
        }  # fmt: skip
    print(json.dumps(found, indent=1))
    if said.check and (found["beside_the_weights"] > ALLOWANCE or found["cached_seconds"] > 3):
        raise SystemExit(1)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
