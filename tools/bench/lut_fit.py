"""Fitting lookup tables and their scales: time beside peers, in runs that take turns, and how near the optimum.

python tools/bench/lut_fit.py [--weights 1048576] [--repeats 3] [--model] [--check]

Levels: ours against the exact one-dimensional k-means of coremltools, on the same random normal weights; levels and the
index of every weight from both. It is timed twice: ``_kmeans1d`` on the weights as they are, and, if those are 16-bit,
its palettization, which looks for the distinct ones first. Where coremltools is not installed, the peer is a plain
dynamic program over the distinct values, without a goal for its time. Scales: rank 32 from the matrix of group scales
against the SVD of what it expands to. ``--model`` fits a block of the shape of Qwen3-0.6B at q2a4.

Each figure is the shortest process time of the runs on one thread.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent.parent

FASTER = {"bf16": 100.0, "fp32": 5.0}
"""Goals, in times of ``_kmeans1d``."""

MORE_INERTIA = {"bf16": 1e-6, "fp32": 10 ** (0.02 / 10) - 1}
"""How far above the optimum the centres may be: nothing but rounding, and 0.02 dB."""

PLAIN = 8192
"""fp32 weights that the plain dynamic program, which takes the square of their number, is given."""

SCALES_FASTER = 250.0
SHAPE, RANK, GROUP = (3072, 1024), 32, 32

BLOCK = {"q_proj": (2048, 1024), "k_proj": (1024, 1024), "v_proj": (1024, 1024), "o_proj": (1024, 2048),
         "gate_proj": (3072, 1024), "up_proj": (3072, 1024), "down_proj": (1024, 3072)}  # fmt: skip
BLOCKS, MODEL_SECONDS = 28, 180.0
"""Of Qwen3-0.6B; the goal is 90 s on two cores."""


def shortest(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The shortest process time of each call, in seconds; they take turns, so that a busy machine slows all."""
    found = dict.fromkeys(calls, math.inf)
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.process_time()
            call()
            found[name] = min(found[name], time.process_time() - start)
    return found


@cache
def coremltools() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """``_kmeans1d.cluster``, and the palettization around it; None where it is not installed."""
    try:
        kmeans1d = importlib.import_module("coremltools._deps")._kmeans1d
        palettize = importlib.import_module("coremltools.models.neural_network.quantization_utils")
    except ImportError as error:
        print(f"coremltools cannot be imported ({error}); the peer is a plain dynamic program")
        return None
    return kmeans1d.cluster, palettize._get_kmeans_lookup_table_and_weight


def plain_kmeans(values: Tensor, n: int) -> np.ndarray[Any, Any]:
    """The exact optimum by the textbook program: every end, every start, one row of the table after another."""
    x, counts = torch.unique(values.double(), return_counts=True)
    count = np.concatenate(([0.0], np.cumsum(counts.numpy().astype(float))))
    total = np.concatenate(([0.0], np.cumsum((x * counts).numpy())))
    m, rows = x.numel(), []
    best = np.concatenate(([0.0], total[1:] ** 2 / count[1:]))
    for runs in range(2, n + 1):
        found, choice = np.full(m + 1, -np.inf), np.zeros(m + 1, int)
        for end in range(runs, m + 1):
            value = best[runs - 1 : end] + (total[end] - total[runs - 1 : end]) ** 2 / (
                count[end] - count[runs - 1 : end]
            )
            at = int(np.argmax(value))
            found[end], choice[end] = value[at], at + runs - 1
        best = found
        rows.append(choice)
    borders = [m]
    for choice in reversed(rows):
        borders.append(int(choice[borders[-1]]))
    ends = np.array([0, *reversed(borders)])
    return np.diff(total[ends]) / np.diff(count[ends])


def inertia(values: Tensor, centres: Any) -> float:
    """The summed squared distance of each value to its nearest centre."""
    levels = torch.as_tensor(np.asarray(centres, dtype=np.float64))
    x = values.double().reshape(-1)
    return float((x - levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]).square().sum())


def levels(values: Tensor, n: int, repeats: int) -> bool:
    """Time and inertia of ``n`` levels for these values; whether the goals are kept."""
    from graph.formats.kmeans import exact_centres, weighted_points
    from graph.formats.levels import fit_levels, nearest

    kind = "bf16" if values.dtype == torch.bfloat16 else "fp32"
    peer = coremltools()
    raw = values.float().numpy()
    calls: dict[str, Callable[[], object]] = {"qc": lambda: nearest(values, fit_levels(values, n))}
    if peer is not None:
        cluster, palettize = peer
        calls["coremltools _kmeans1d"] = lambda: cluster(raw, n)
        if kind == "bf16":
            half = values.half().numpy()
            calls["coremltools palettization, as fp16"] = lambda: palettize(int(math.log2(n)), half)
        exact = cluster(raw, n).centroids
    else:
        values = values if kind == "bf16" else values[:PLAIN]
        calls["plain dynamic program"] = lambda: plain_kmeans(values, n)
        exact = plain_kmeans(values, n)
    seconds = shortest(calls, repeats)
    optimum = inertia(values, exact)
    more = inertia(values, exact_centres(*weighted_points(values, None, n), n)) / optimum - 1
    rounded = 10 * math.log10(inertia(values, fit_levels(values, n)) / optimum)
    print(f"{values.numel()} {kind} weights, {n} levels: qc {1e3 * seconds['qc']:.1f} ms")
    for name, time_taken in seconds.items():
        if name != "qc":
            print(f"  {name:36} {1e3 * time_taken:9.1f} ms   {time_taken / seconds['qc']:7.1f} x")
    print(f"  inertia above the optimum {more:.1e}, and rounded to fp16 {rounded:.5f} dB")
    slowest = max(value for name, value in seconds.items() if name != "qc")
    return more <= MORE_INERTIA[kind] and rounded <= 0.02 and (peer is None or slowest >= FASTER[kind] * seconds["qc"])


def scales(repeats: int) -> bool:
    """Time and error of low-rank scales from the group matrix and from its expansion; whether the goals are kept."""
    from graph.formats.scales import group_absmax, low_rank_of_groups

    s = group_absmax(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)), GROUP)
    dense = s.repeat_interleave(GROUP, dim=1)
    seconds = shortest(
        {
            "qc": lambda: low_rank_of_groups(s, GROUP, SHAPE[1], RANK),
            "svd": lambda: torch.linalg.svd(dense, full_matrices=False),
        },
        repeats,
    )
    a, g, b = low_rank_of_groups(s, GROUP, SHAPE[1], RANK)
    u, d, v = torch.linalg.svd(dense, full_matrices=False)
    ours = float(torch.linalg.vector_norm((a * g) @ b - dense) / torch.linalg.vector_norm(dense))
    theirs = float(
        torch.linalg.vector_norm((u[:, :RANK] * d[:RANK]) @ v[:RANK] - dense) / torch.linalg.vector_norm(dense)
    )
    ratio = seconds["svd"] / seconds["qc"]
    print(f"scales of rank {RANK}, {list(SHAPE)}: qc {1e3 * seconds['qc']:.2f} ms, error {ours:.1e}")
    print(f"  {'SVD of the expanded matrix':36} {1e3 * seconds['svd']:9.1f} ms   {ratio:7.1f} x   error {theirs:.1e}")
    return ratio >= SCALES_FASTER and ours <= max(theirs, 1e-5)


def model() -> bool:
    """Fit one block of Qwen3-0.6B at q2a4 and say what all blocks take; whether that keeps the goal."""
    from graph.formats.low_rank import fit_scales

    generator = torch.Generator().manual_seed(0)
    taken = 0.0
    for name, shape in BLOCK.items():
        w = torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
        n, rank, group = (4, 32, 16) if shape[0] == 3072 or shape[1] == 3072 else (16, 8, 32)
        start = time.process_time()
        found = fit_scales(w, n, rank=rank, group=group)
        seconds = time.process_time() - start
        taken += seconds
        errors = f"{found.errors[0]:.4f} -> {found.errors[-1]:.4f}"
        print(f"  {name:10} {n:2} levels, rank {rank:2}: {1e9 * seconds / w.numel():5.0f} ns a weight, error {errors}")
    print(f"a whole model of {BLOCKS} such blocks: {BLOCKS * taken:.0f} s of one core")
    return BLOCKS * taken <= MODEL_SECONDS


def main() -> None:
    """Run and print; with --check, exit 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=int, default=1 << 20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", action="store_true")
    parser.add_argument("--check", action="store_true")
    said = parser.parse_args()
    torch.set_num_threads(1)
    values = torch.randn(said.weights, generator=torch.Generator().manual_seed(0))
    kept = [levels(v, n, said.repeats) for v in (values.bfloat16(), values) for n in (4, 16)]
    kept.append(scales(said.repeats))
    if said.model:
        kept.append(model())
    if said.check and not all(kept):
        raise SystemExit(1)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
