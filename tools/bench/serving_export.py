"""Export a model of random weights for GPU servers: time and peak memory, beside copying its file.

python tools/bench/serving_export.py [--layers 28] [--targets fp8,nvfp4] [--command] [--work FOLDER] [--check]

The model is of Qwen3's architecture, 1536 wide: 28 layers and a vocabulary of 151,936 are 1.5 B weights. Each export
runs in a process of its own and streams the checkpoint; its peak memory is the high-water mark of that process. NVFP4
is weight-only: calibration runs the model, which is another cost. Copies are of the model's file, each to a new file
that is on disk before the clock stops, as that of an export is.

With --command the model is compiled first, in bf16 and without passes, and what is timed is ``qc export`` of that
artifact, from the start of Python to its end.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch

from tools.bench.resident import kibibytes

COPIES, RSS_GIB = 6, 2.0
"""How many copies an export may take, and how much memory."""

OPTIONS = {"nvfp4": {"weight_only": True}}


def make_model(folder: Path, layers: int) -> Path:
    """Write the model, one tensor at a time; its file."""
    from transformers import Qwen3Config

    from graph.tracing import on_meta
    from graph.weights import Entry, write

    config = Qwen3Config(
        hidden_size=1536, num_hidden_layers=layers, num_attention_heads=12, num_key_value_heads=2, head_dim=128,
        intermediate_size=8960, vocab_size=151936, tie_word_embeddings=True, architectures=["Qwen3ForCausalLM"],
    )  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    noise = (torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)
    shapes = {
        name: tuple(value.shape) for name, value in on_meta(config, "causal-lm", torch.float32).state_dict().items()
    }
    kept = {name: shape for name, shape in shapes.items() if name != "lm_head.weight"}
    entries = [Entry(name, shape, torch.bfloat16, _filled(noise, shape)) for name, shape in kept.items()]
    write(folder, entries, stem="model", max_shard=1 << 40)
    return folder / "model.safetensors"


def _filled(noise: torch.Tensor, shape: tuple[int, ...]) -> Callable[[], torch.Tensor]:
    def load() -> torch.Tensor:
        count = torch.Size(shape).numel()
        return noise.repeat(-(-count // len(noise)))[:count].view(shape)

    return load


def worker(target: str, model: str, out: str) -> None:
    """Export, and print seconds, CPU seconds and the peak of the resident set in GiB."""
    from graph import capture
    from runtimes.export import default_dtype, find

    start, cpu = time.perf_counter(), time.process_time()
    report = find(target)(capture(model), Path(out), dtype=default_dtype(target), **OPTIONS.get(target, {}))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(json.dumps([seconds, cpu, kibibytes("VmHWM") / 2**20, report.bytes]))


def exported(target: str, model: Path, out: Path) -> list[float]:
    """What ``worker`` prints, of a process of its own."""
    command = [sys.executable, __file__, "--worker", target, str(model), str(out)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def exported_by_command(target: str, model: Path, out: Path) -> list[float]:
    """The same of ``qc export``, start and end of its process included."""
    runs, recipe = model.parent / "runs", model.parent / "plain.yaml"
    if not runs.exists():
        recipe.write_text(f"name: plain\nmodel: {json.dumps(str(model))}\ndtype: bf16\npasses: []\n")
        _qc("compile", str(recipe), "--runs", str(runs))
    options = ["--weight-only"] if OPTIONS.get(target) else []
    start = time.perf_counter()
    used = _qc("export", "--runs", str(runs), "--target", target, *options, "--no-verify", "--out", str(out))
    size = sum(path.stat().st_size for path in out.iterdir() if path.is_file())
    return [time.perf_counter() - start, used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20, size]


def _qc(*arguments: str) -> resource.struct_rusage:
    """Run the command line of this checkout; what its process used."""
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen([sys.executable, "-m", "qc", *arguments], cwd=root, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"qc {arguments[0]} exited with {process.returncode}")
    return used


def copy_seconds(file: Path) -> float:
    """Seconds that a copy takes."""
    to, start = file.with_suffix(".copy"), time.perf_counter()
    shutil.copyfile(file, to)
    with open(to, "rb") as copied:
        os.fsync(copied.fileno())
    seconds = time.perf_counter() - start
    to.unlink()
    return seconds


def main() -> None:
    """Run and print a table; with --check, fail where a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--targets", default="fp8,nvfp4")
    parser.add_argument("--command", action="store_true", help="time `qc export` of an artifact, as a whole process")
    parser.add_argument("--work", type=Path, help="folder for the model and its exports; without it, a temporary one")
    parser.add_argument("--check", action="store_true", help="exit 1 where a limit is missed")
    said = parser.parse_args()
    missed = False
    with tempfile.TemporaryDirectory(prefix="qc-serving-", dir=said.work) as temporary:
        file = make_model(Path(temporary) / "model", said.layers)
        print(f"{file.stat().st_size / 1e9:.2f} GB of random weights", flush=True)
        for target in said.targets.split(","):
            before = copy_seconds(file)
            out = Path(temporary) / target
            seconds, cpu, peak, size = (exported_by_command if said.command else exported)(target, file.parent, out)
            copies = seconds / ((before + copy_seconds(file)) / 2)
            took = f"{seconds:6.1f} s, {cpu:6.1f} s of CPU, {copies:5.1f} copies of {COPIES}"
            print(f"{target:<6} {took}, {peak:.2f} GiB of {RSS_GIB:g}, {size / 1e9:.2f} GB written", flush=True)
            missed = missed or copies > COPIES or peak > RSS_GIB
            shutil.rmtree(out)
    if said.check and missed:
        raise SystemExit(1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:5])
    else:
        main()
