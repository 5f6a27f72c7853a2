"""The kernels of bitsandbytes, for CPU and CUDA."""

from __future__ import annotations

from typing import Any

import torch


def kernels() -> Any:
    """Its ops. They take seconds to import, so that is put off until there is a weight to work on."""
    import bitsandbytes  # noqa: F401  # registers them

    return torch.ops.bitsandbytes
