"""The sections of a recipe that no runtime owns: gates, exports, the probe inputs.

The fields are the keys of a recipe; their docstrings become the descriptions of the JSON Schema.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from recipes.metrics import MetricName
from recipes.numbers import Count, Text


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A condition; if it does not hold, the run stops with a report and a non-zero exit."""

    metric: MetricName
    """What is compared."""

    op: Literal["<", "<=", ">", ">=", "==", "finite", "decreased"]
    """How; finite and decreased need no value."""

    value: float | None = None
    """What it is compared with, in the unit of the metric."""

    window: Count | None = None
    """Values averaged at both ends of the series, for decreased; without it, 10."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """Something to write for another runtime."""

    target: Literal["safetensors"]
    """The runtime's format."""

    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Dtype of the floating tensors."""

    max_shard_size: Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(KB|MB|GB)$")] = "5GB"
    """Size of the largest file, in KB, MB or GB (powers of 10): 500MB."""

    out: Text | None = None
    """Folder to write, relative to the current one; without it, one in the run's folder."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The inputs on which a pass is held to its contract."""

    batch: Count = 2
    """Sequences."""

    length: Count = 16
    """Tokens per sequence."""
