"""Verifying a ternary export: the integers, by a reader that knows the file alone, and the floats, by transformers.

The share of tokens at which both find the same one likeliest is the fidelity of the floats. Both sides read their
activations alike: where the graph rounds tokens to 8 bits, that is left out of it. It is no measure of quality, which
is a comparison with the model that was compressed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graph import Graph
from graph.formats.tokens import with_plain_tokens
from runtimes.export.ternary import FLOATS, RECORD, WEIGHTS
from runtimes.verify.findings import Finding, Report, hashes, read_about
from runtimes.verify.weights import Probe, Verification, probe_batches, unread, verify_weights

FIDELITY = 0.995
"""The least share of tokens at which graph and floats agree."""


@dataclass(frozen=True)
class TernaryVerification(Report):
    """What was found of a ternary export."""

    floats: Verification
    fidelity: float

    def figures(self) -> dict[str, Any]:
        """For a report or ``--json``."""
        return {**self.floats.figures(), "passed": self.passed, "dequant_fidelity": self.fidelity}


def verify_ternary(
    folder: Path, graph: Graph, *, tokenizer: Any = None, timeout: float = 3600.0
) -> TernaryVerification:
    """Check the export in ``folder`` against the ``graph`` it was made of; arguments as of ``verify_weights``."""
    files = (hashes(folder, read_about(folder)),)
    if not files[0].passed:
        return TernaryVerification(files, unread(files), 0.0)
    plain = with_plain_tokens(graph)
    floats = verify_weights(folder / FLOATS, plain, tokenizer=tokenizer, timeout=timeout, probes=many_probes(plain))
    named = tuple(replace(one, what=f"floats: {one.what}") for one in floats.findings)
    agree = Finding(
        "floats agree with the graph", floats.top1 >= FIDELITY, f"at {floats.top1:.2%} of the tokens, of {FIDELITY:.1%}"
    )
    return TernaryVerification((*files, integers(folder), *sizes(folder), *named, agree), floats, floats.top1)


def many_probes(graph: Graph) -> list[Probe]:
    """The probes of every verification, and tokens enough that one of them is less than a thousandth."""
    (ids, _), *_ = found = probe_batches(graph)
    many = torch.randint(0, int(ids.max()) + 1, (16, 64), generator=torch.Generator().manual_seed(1))
    return [*found, (many, torch.ones_like(many))]


def integers(folder: Path) -> Finding:
    """Whether scale times integer is each float, bit for bit; files read and unpacked with numpy alone."""
    from safetensors import safe_open

    record = json.loads((folder / RECORD).read_text())
    dense: dict[str, Path] = {}
    for path in sorted((folder / FLOATS).glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            dense |= dict.fromkeys(file.keys(), path)
    with safe_open(folder / WEIGHTS, framework="pt") as packed:
        for name, entry in record["weights"].items():
            if name not in dense:
                return Finding("integers", False, f"{FLOATS} has no {name}")
            trits = unpacked(packed.get_tensor(f"{name}.indices").numpy(), entry["packing"], entry["shape"][1])
            scale = packed.get_tensor(f"{name}.scale").float().numpy()
            wide = np.repeat(
                np.broadcast_to(scale, (trits.shape[0], scale.shape[1])), trits.shape[1] // scale.shape[1], 1
            )
            made = torch.from_numpy((trits.astype(np.float32) - 1) * wide)
            with safe_open(dense[name], framework="pt") as file:
                there = file.get_tensor(name)
            if not torch.equal((made.t() if entry["transposed"] else made).to(there.dtype), there):
                return Finding("integers", False, f"scale times integer of {name} is not what {FLOATS} holds")
    return Finding("integers", True, f"scale times integer of {len(record['weights'])} weights, bit for bit")


def unpacked(packed: Any, packing: str, columns: int) -> Any:
    """Trits of 0 to 2 from bytes: four by two bits, or five digits to the base 3, the first the lowest."""
    if packing == "2bit":
        trits = np.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1)
    else:
        trits = np.stack([packed // 3**place % 3 for place in range(5)], axis=-1)
    return trits.reshape(packed.shape[0], -1)[:, :columns]


def sizes(folder: Path) -> tuple[Finding, ...]:
    """Whether the file is as large as its record says, and that as the formula says."""
    figures = json.loads((folder / RECORD).read_text())["figures"]
    there, said, formula = (folder / WEIGHTS).stat().st_size, figures["bytes"], figures["formula_bytes"]
    return (Finding("size", there == said, f"{there:,} bytes, {there / formula - 1:+.2%} of the formula"),)
