"""Small random models, captured once."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers

from graph import Graph, capture
from graph.formats import LutOptions
from passes.quantize_base import QuantizeBase
from passes.runner import apply
from tests.architectures import CAUSAL, config


@cache
def _captured(name: str) -> Graph:
    torch.manual_seed(0)
    auto = transformers.AutoModelForCausalLM if name in CAUSAL else transformers.AutoModel
    made: Any = auto.from_config(config(name)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return capture(made)


def random(name: str) -> Graph:
    """The small configuration of that name, none of its weights zero or one."""
    return _captured(name).copy()


def quantized(graph: Graph, scheme: Any, **options: Any) -> Graph:
    """``graph`` with the weights of its blocks packed."""
    given = {"lut": LutOptions(**options)} if scheme == "lut" else options
    apply(QuantizeBase(scheme=scheme, **given), graph, check=False)
    return graph


def tokens(count: int, vocabulary: int = 99) -> list[int]:
    """Tokens that mean nothing, none of them special."""
    generator = torch.Generator().manual_seed(1)
    return [int(i) for i in torch.randint(5, vocabulary, (count,), generator=generator)]
