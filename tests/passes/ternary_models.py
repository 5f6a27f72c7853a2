"""A small net with ternary weights, latent, frozen or float again."""

from __future__ import annotations

from typing import Any

import torch

from graph import Graph, capture_module
from passes.dequantize import Dequantize
from passes.freeze_ternary import FreezeTernary
from passes.runner import apply
from passes.ternary_ste import TernarySte
from tests.passes.lut_models import ALL, Mlp, x


def plain() -> Graph:
    torch.manual_seed(0)
    return capture_module(Mlp(), x)


def latent(**options: Any) -> Graph:
    """Its weights as they train."""
    graph = plain()
    apply(TernarySte(select=ALL, **options), graph)
    return graph


def frozen(packing: Any = "2bit", **options: Any) -> Graph:
    """Its weights packed."""
    graph = latent(**options)
    apply(FreezeTernary(packing=packing), graph)
    return graph


def floats(**options: Any) -> Graph:
    """Its weights floats again, their scales beside them."""
    graph = frozen(**options)
    apply(Dequantize(), graph)
    return graph
