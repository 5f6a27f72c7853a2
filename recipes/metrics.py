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
    "train/encoder_grad_norm",
    "train/gca_grad_norm",
    "train/gate_avg",
    "train/gate_moved",
    "eval/exact_match",
    "exact_match",
    "prefix_match",
    "substring_match",
    "exact_match/no_memory",
    "exact_match/shuffled",
    "memory_contribution",
    "embedding/cosine",
    "embedding/spearman",
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

RETRIEVED = (
    "exact_match",
    "prefix_match",
    "substring_match",
    "exact_match/no_memory",
    "exact_match/shuffled",
    "memory_contribution",
)
"""Metrics of an evaluation that asks questions."""

EVALUATED: dict[str, str] = {
    "perplexity": "perplexity",
    "perplexity_ratio": "perplexity",
    "kl": "kl",
    "top1": "top1",
    **dict.fromkeys(RETRIEVED, "retrieval"),
    **dict.fromkeys(("embedding/cosine", "embedding/spearman"), "embedding"),
}
"""Metrics of an evaluation, and the name under which ``evaluate.metrics`` asks for each.

``perplexity_ratio`` is the perplexity over that of the graph before the passes.
"""

COLUMNS: dict[str, str] = {
    "train/loss": "loss",
    "train/grad_norm": "grad_norm",
    "eval/loss": "eval_loss",
    "train/encoder_grad_norm": "grad_norm/encoder",
    "train/gca_grad_norm": "grad_norm/gca",
    "train/gate_avg": "gate_avg",
    "train/gate_moved": "gate_moved",
    "eval/exact_match": "eval_exact_match",
}
"""Metrics of a training, and where ``metrics.csv`` has them; ``train/`` are series over its steps, ``eval/`` over its
evaluations. The norms are those of gradients between backward and step, of the groups ``encoder`` and ``gca``."""

TRAINED = tuple(COLUMNS)

GROUPS = {"train/encoder_grad_norm": "encoder", "train/gca_grad_norm": "gca"}
"""Metrics of one group of the training, and the group."""

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

SERIES = TRAINED
"""Metrics with a value at many steps: those that can have decreased."""
