"""How close a packed weight is to the weight it was packed from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import Tensor

from graph.formats.format import Format, chunks, unpack

ROUNDING = 1.001
"""What fp32 arithmetic adds to an error that is half a step in exact numbers."""


@dataclass(frozen=True)
class Fidelity:
    """What packing did to one weight."""

    snr_db: float
    """Signal-to-noise ratio, ``10 log10(sum w² / sum (w - unpacked)²)``; inf where nothing changed."""

    faithful: bool
    """Every value is within half a step of its own, as the levels allow. False is a bug, never a bad weight."""

    @property
    def relative_error(self) -> float:
        """``|w - unpacked| / |w|`` in the Frobenius norm."""
        return 0.0 if math.isinf(self.snr_db) else float(10 ** (-self.snr_db / 20))


def fidelity(form: Format, w: Tensor, packed: Mapping[str, Tensor]) -> Fidelity:
    """Compare ``w`` [out, in] with what ``packed`` unpacks to, a few rows at a time."""
    cut = form.by_row(packed)
    largest = max(abs(float(x)) for x in w.aminmax())
    signal = noise = 0.0
    faithful = True
    for part in chunks(w):
        rows, sides = w[part].float(), cut(part)
        error = (rows - unpack(form, sides, torch.float32)).abs_()
        signal += float(torch.linalg.vector_norm(rows, dtype=torch.float64)) ** 2
        noise += float(torch.linalg.vector_norm(error, dtype=torch.float64)) ** 2
        allowed = form.widest_error(rows, sides, largest) * ROUNDING + 1e-30
        faithful = faithful and bool((error.view(*allowed.shape, -1).amax(-1) <= allowed).all())
    return Fidelity(10 * math.log10(signal / noise) if noise and signal else -math.inf if noise else math.inf, faithful)


@dataclass
class Tally:
    """What is reported of the weights packed so far; of a plan without values, sizes only."""

    weights: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    bytes_baked: int | None = None
    """The same with levels and scales in fp16; None where no weight has any."""

    scales: int = 0
    """Weights that have a scale."""

    not_positive: int = 0
    """Of these, those whose scale is zero or less."""

    seen: dict[str, Fidelity] = field(default_factory=dict)

    def add(self, name: str, w: Tensor, packed: Mapping[str, Tensor], found: Fidelity | None) -> None:
        """Count the weight ``name``."""
        self.weights += w.numel()
        self.bytes_before += w.nbytes
        self.bytes_after += sum(side.nbytes for side in packed.values())
        if found is not None:
            self.seen[name] = found

    def add_scales(self, once_baked: int, scales: int, not_positive: int) -> None:
        """Count the levels and scales of a LUT weight."""
        self.bytes_baked = (self.bytes_baked or 0) + once_baked
        self.scales += scales
        self.not_positive += not_positive

    def summary(self) -> dict[str, float | int | str]:
        """The figures under the names that a report gives them."""
        if not self.weights:
            return {}
        found: dict[str, float | int | str] = {
            "weights": self.weights,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bits_per_weight": round(8 * self.bytes_after / self.weights, 3),
        }
        if self.bytes_baked is not None:
            found["bytes_once_baked"] = self.bytes_baked
            found["bits_per_weight_once_baked"] = round(8 * self.bytes_baked / self.weights, 3)
        if self.seen and self.scales:
            found["scales_not_positive"] = round(self.not_positive / self.scales, 6)
        if self.seen:
            worst = min(self.seen, key=lambda name: self.seen[name].snr_db)
            found["mean_snr_db"] = round(fmean(one.snr_db for one in self.seen.values()), 2)
            found["worst_snr_db"] = round(self.seen[worst].snr_db, 2)
            found["worst_relative_error"] = round(self.seen[worst].relative_error, 5)
            found["worst_tensor"] = worst
        return found
