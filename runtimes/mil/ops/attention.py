"""The fused attention of opset CoreML8."""

from __future__ import annotations

import torch
from torch import Tensor

from runtimes.mil.ops.table import op


@op(results="query")
def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(d) + mask) V; a mask of bools keeps what is true."""
    scores = query @ key.mT / query.shape[-1] ** 0.5
    if attn_mask is not None:
        extra = torch.where(attn_mask, 0.0, -torch.inf) if attn_mask.dtype is torch.bool else attn_mask
        scores = scores + extra
    return torch.softmax(scores, -1) @ value
