"""Ops that move values among features, and powers: what they give is what the graph gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from graph import QcError, capture_module
from graph.ops import op_name
from runtimes.ane import layout, pointwise  # noqa: F401  they fill the table
from runtimes.ane.emitter import Emitter
from runtimes.ane.lowering import Lowering, Options, Value
from tests.runtimes.ane.executed import Executor


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def lowered(function: Callable[[Tensor], Tensor], tokens: int) -> tuple[list[str], Tensor, Tensor]:
    """The ops, what they give, and what the function gives, [tokens, size] each."""
    graph = capture_module(Function(function), torch.randn(1, 16))  # a feature of size 1 stands where tokens would
    x = torch.randn(tokens, 16, generator=torch.Generator().manual_seed(0))
    executor = Executor({}, {}, frozenset())
    low = Lowering(graph, cast(Emitter, executor), tokens, Options())
    nodes = [
        n for n in graph.module.graph.nodes if n.op == "call_function" and not op_name(n.target).endswith("size.int")
    ]
    source = next(n for n in graph.module.graph.nodes if n.op == "placeholder")
    low.results[source] = Value(cast(Any, x.T.reshape(1, 16, 1, tokens)), (1, 16))
    low.run(nodes)
    found: Any = low.channels(low.value(graph.output_nodes()[0]))
    return executor.ops, found[0, :, 0].T, function(x)


def turned_pairs(x: Tensor) -> Tensor:
    heads = x.unflatten(-1, (2, 8))
    return torch.stack((-heads[..., 1::2], heads[..., ::2]), dim=-1).flatten(-2).flatten(-2)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(
    "function",
    [
        turned_pairs,
        lambda x: torch.stack(x.chunk(2, -1), dim=-2).flatten(-2),
        lambda x: torch.cat((x[..., 3::5], x[..., :13]), dim=-1),
        lambda x: x.relu().square(),
        lambda x: x.pow(3) + x**2,
    ],
)
def test_what_is_lowered_gives_what_the_function_gives(function: Callable[[Tensor], Tensor], tokens: int) -> None:
    _, found, expected = lowered(function, tokens)
    torch.testing.assert_close(found, expected)


def test_other_powers_are_refused() -> None:
    with pytest.raises(QcError, match=r"raises to the power 2\.5"):
        lowered(lambda x: x**2.5, 1)
