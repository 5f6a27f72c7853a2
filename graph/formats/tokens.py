"""Activations in 8 bits, one scale a token, as BitNet's linears read them (arXiv:2402.17764)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graph.core import Graph
from graph.ops import op

SMALLEST = 1e-5
"""What the largest magnitude of a token is at least."""


@op
def fake_quantize_tokens(x: Tensor, bits: int = 8) -> Tensor:
    """Each token on whole numbers of ``bits`` bits: ``clip(round(x * s), -128, 127) / s`` with ``s = 127 / max|x|``.

    x: [..., d], a token a row  ->  like x, computed in fp32

    Gradients pass unchanged.
    """
    assert 2 <= bits <= 8, f"{bits} bits"
    return _FakeQuantizeTokens.apply(x, bits)


class _FakeQuantizeTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        most = 2 ** (bits - 1) - 1
        wide = x.float()
        step = wide.abs().amax(-1, keepdim=True).clamp(min=SMALLEST) / most
        return (wide / step).round_().clamp_(-most - 1, most).mul_(step).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def with_plain_tokens(graph: Graph) -> Graph:
    """A copy whose linears read their inputs as they are; the graph itself, where they do so already."""
    if not graph.sites("qc.fake_quantize_tokens"):
        return graph
    plain = graph.copy()
    for site in plain.sites("qc.fake_quantize_tokens"):
        site.node.replace_all_uses_with(site.input(0))
    plain.module.graph.eliminate_dead_code()
    plain.verify()
    return plain
