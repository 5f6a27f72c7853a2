"""Compile a random model of the shape of Qwen3-0.6B to q2a4, rounded as a device holds it: time, and bytes on disk.

python tools/bench/lut_compile.py [--vector] [--work FOLDER] [--check]

596 M bf16 weights, 440 M of which become 2 or 4 bits. The bytes of indices, levels and scales are compared with the
formula ``bits + 16 rank (out + in) / (out in)`` of docs/lut.md. With --vector all of them become 16 vectors of 2 with a
scale a row instead: ``bits / V + 16 / in + 16 V 2^bits / (out in)``. --work keeps the model (1.2 GB) for the next time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

SECONDS, MORE = 120.0, 0.01
"""Goals: on two cores, and how far the bytes may be from the formula."""

RECIPE = """\
model: model
stages:
  - name: low-bit
    passes: [{quantize-base: {scheme: lut, lut: {%s, train: none}}}]
  - name: baked
    passes: [ste-fp16, {snap: {select: {name: "*_proj.weight.*"}}}]
"""
SAID = {False: "preset: q2a4", True: "bits: 4, vector: 2, scale: channel"}


def prepare(folder: Path) -> None:
    """A checkpoint of random bf16 weights."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    config = Qwen3Config(
        hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
        intermediate_size=3072, vocab_size=151936, max_position_embeddings=40960, tie_word_embeddings=True,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def measured(work: Path, vector: bool) -> dict[str, float]:
    """Compile with all checks, timed; then round, and count the bytes."""
    import qc
    from graph.artifact import load
    from graph.formats import packed_sites
    from graph.formats.stored import format_of

    (work / "recipe.yaml").write_text(RECIPE % SAID[vector])
    start = time.perf_counter()
    cpu = time.process_time()
    with tempfile.TemporaryDirectory(dir=work) as runs:
        qc.compile(work / "recipe.yaml", runs=runs)
        found = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
        qc.run(work / "recipe.yaml", runs=runs)
        (baked,) = Path(runs).glob("*/*/baked/compiled")
        graph = load(baked).graph
        stored = expected = weights = 0.0
        for site in packed_sites(graph):
            form, (rows, columns) = format_of(site), site.value.shape
            weights += rows * columns
            expected += formula(form, rows, columns)
            names = [name for name in site.tensors() if name in graph.stored]
            stored += sum(graph.stored[name].end - graph.stored[name].start for name in names)
    return found | {"weights": weights, "bytes": stored, "bits_per_weight": 8 * stored / weights,
                    "over_formula": stored / expected - 1}  # fmt: skip


def formula(form: Any, rows: int, columns: int) -> float:
    """The bytes of a weight."""
    from graph.formats import VectorLut

    indices = (form.levels.bit_length() - 1) * rows * columns / 8
    if isinstance(form, VectorLut):
        return indices / form.vector + 2 * rows + 2 * form.vector * form.levels
    return float(indices + 2 * form.rank * (rows + columns))


def main() -> None:
    """Run and print; with --check, fail where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vector", action="store_true", help="16 vectors of 2 in the place of q2a4")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--check", action="store_true", help="exit 1 where time or bytes miss their goal")
    said = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = said.work or Path(folder)
        if not (work / "model" / "config.json").is_file():
            prepare(work / "model")
        found = measured(work, said.vector)
    print(json.dumps(found, indent=1))
    if said.check and (found["seconds"] > SECONDS or abs(found["over_formula"]) > MORE):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
