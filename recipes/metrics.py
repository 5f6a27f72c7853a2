"""The metrics a gate can ask for, and what produces each."""

from __future__ import annotations

from typing import Literal, TypeAlias

MetricName: TypeAlias = Literal[
    "perplexity",
    "perplexity_ratio",
    "kl",
    "top1",
    "train/loss",
    "train/grad_norm",
    "eval/loss",
    "bits_per_weight",
    "bytes",
    "lora/survived",
    "export/psnr_db",
    "dequant_fidelity",
    "gradient_flow/passed",
    "gradient_flow/dead",
    "assess/level",
    "assess/crossed",
]

EVALUATED: dict[str, str] = {"perplexity": "perplexity", "perplexity_ratio": "perplexity", "kl": "kl", "top1": "top1"}
"""Metrics of an evaluation, and the name under which ``evaluate.metrics`` asks for each.

``perplexity_ratio`` is the perplexity over that of the graph before the passes.
"""

TRAINED = ("train/loss", "train/grad_norm", "eval/loss")
"""Metrics of every training; ``train/`` are series over its steps, ``eval/loss`` over its evaluations."""

REPORTED: dict[str, str] = {"lora/survived": "merge-lora"}
"""Metrics of a pass's report, and the pass."""

EXPORTED = ("export/psnr_db", "dequant_fidelity")
"""Metrics of the check of exports against the graph; ``dequant_fidelity`` is of the target ternary."""

LOOKED: dict[str, str] = {
    "gradient_flow/passed": "audit",
    "gradient_flow/dead": "audit",
    "assess/level": "assess",
    "assess/crossed": "assess",
}
"""Metrics of a look at what the passes made, and the section that asks for it."""

SERIES = ("train/loss", "train/grad_norm", "eval/loss")
"""Metrics with a value at many steps: those that can have decreased."""
