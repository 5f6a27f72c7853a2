"""A small net with LUT weights, in either form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graph import Graph, Selector, capture_module
from graph.formats import LutOptions
from passes.quantize_base import QuantizeBase
from passes.runner import apply

ALL = Selector(role="*")


class Mlp(nn.Module):
    """Two linears, and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 64)
        self.down = nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).half().float()


def packed(**options: Any) -> Graph:
    """The net, its weights on 16 levels with scales of rank 4 unless told otherwise."""
    torch.manual_seed(0)
    graph = capture_module(Mlp(), x)
    settings = {"bits": 4, "rank": 4, "group": 16} | options
    apply(QuantizeBase(select=ALL, scheme="lut", lut=LutOptions(**settings)), graph)
    return graph


def latent(**options: Any) -> Graph:
    """The net with latent weights."""
    return packed(form="latent", **({"train": "weights"} | options))


def sink(graph: Graph, rank: int = 0) -> Graph:
    """Let some of the scales of ``up`` be negative, as training can."""
    a = graph.tensor("up.weight.scale_a").detach().clone()
    a[::16, rank] *= -1
    graph.set_tensor("up.weight.scale_a", a)
    return graph
