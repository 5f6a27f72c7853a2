"""Quantize and pack a weight, beside the library whose format it is doing the same in the same process, byte for byte.

python tools/bench/pack.py [--size 4096] [--rounds 3] [--only nvfp4,int4] [--check]

Each side finds its scales and packs an fp32 weight [size, size] on one thread, in turn: bitsandbytes NF4, and
compressed-tensors the rest. CPU seconds are compared, the least of all rounds: they are what a busy machine changes
least. The first round of both is not counted. With --torch our side does without its C.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from graph.formats import FourBit, Scaled, native


class Case(NamedTuple):
    """A format, as both sides call it, and how many times faster packing has to be."""

    form: Scaled | FourBit
    layout: str
    args: dict[str, Any]
    goal: float


def _integers(bits: int) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 32}


CASES = {
    "fp8": Case(Scaled("fp8"), "float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, 10.0),
    "nvfp4": Case(
        Scaled("nvfp4"), "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
         "scale_dtype": torch.float8_e4m3fn}, 15.0,
    ),
    "int4": Case(Scaled("int4", 1, 32), "pack-quantized", _integers(4), 10.0),
    "int2": Case(Scaled("int2", 1, 32), "pack-quantized", _integers(2), 10.0),
    "nf4": Case(FourBit("nf4"), "bitsandbytes", {"blocksize": 64, "quant_type": "nf4"}, 10.0),
}  # fmt: skip


def theirs(case: Case, w: Tensor) -> tuple[Tensor, Tensor]:
    """The bytes of codes and scales that the library makes."""
    if isinstance(case.form, FourBit):
        from bitsandbytes.functional import quantize_4bit

        packed, found = quantize_4bit(w, **case.args)
        return packed.view(w.shape[0], -1), found.absmax.view(w.shape[0], -1).view(torch.uint8)
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args, state = QuantizationArgs(**case.args), {"weight": w}
    if case.form.kind == "nvfp4":
        state["weight_global_scale"] = generate_gparam(w.min(), w.max())
    groups = w.unflatten(1, (-1, case.form.columns or w.shape[1]))
    ends = groups.amin(-1), groups.amax(-1)
    state["weight_scale"], _ = calculate_qparams(*ends, args, state.get("weight_global_scale"))
    peer = BaseCompressor.get_value_from_registry(case.layout)
    made = peer.compress(state, QuantizationScheme(targets=["Linear"], weights=args))
    codes = made["weight_packed"] if "weight_packed" in made else made["weight"]
    return codes.contiguous().view(torch.uint8), made["weight_scale"].contiguous().view(torch.uint8)


def ours(case: Case, w: Tensor) -> tuple[Tensor, Tensor]:
    """The bytes that qc makes."""
    made = case.form.pack(w)
    return made["indices"], made["absmax" if isinstance(case.form, FourBit) else "scale"].view(torch.uint8)


def timed(pack: Callable[[Case, Tensor], tuple[Tensor, Tensor]], case: Case, w: Tensor) -> tuple[float, Any]:
    """CPU seconds, and what was made."""
    start = time.process_time()
    made = pack(case, w)
    return time.process_time() - start, made


def main() -> None:
    """Run and print a table; with --check, fail where bytes differ or a ratio misses its goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="formats, comma-separated; without it all")
    parser.add_argument("--torch", action="store_true", help="as where there is no C compiler")
    parser.add_argument("--check", action="store_true", help="exit 1 where bytes differ or a goal is missed")
    said = parser.parse_args()
    torch.set_num_threads(1)
    if said.torch:
        native.leave_to_torch()
    print(f"packed by {'C' if native.reads(torch.ones(1)) else 'torch'}")
    w = torch.randn(said.size, said.size, generator=torch.Generator().manual_seed(0))
    missed = False
    print(f"{'format':<8}{'ours':>10}{'theirs':>10}{'ratio':>8}{'goal':>6}  bytes")
    for name in said.only.split(",") if said.only else CASES:
        case = CASES[name]
        rounds = [(timed(ours, case, w), timed(theirs, case, w)) for _ in range(said.rounds + 1)]
        same = all(a.equal(b) for mine, other in rounds for a, b in zip(mine[1], other[1], strict=True))
        mine, other = (min(one[side][0] for one in rounds[1:]) for side in (0, 1))
        row = f"{1000 * mine:>7.1f} ms{1000 * other:>7.0f} ms{other / mine:>7.1f}x{case.goal:>5g}x"
        print(f"{name:<8}{row}  {'identical' if same else 'DIFFERENT'}", flush=True)
        missed = missed or not same or other / mine < case.goal
    if said.check and missed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
