"""The ops whose backward is written by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graph.ops import rms_norm, rope


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("turned", [8, 4])
def test_rope_has_the_gradient_of_its_formula_also_where_the_halves_of_its_tables_differ(
    interleaved: bool, turned: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    cos, sin = (torch.randn(1, 5, turned, dtype=torch.float64, generator=generator) for _ in range(2))

    def run(x: Tensor) -> Tensor:
        return rope(x, cos, sin, interleaved)

    assert torch.autograd.gradcheck(run, (x,))
    assert torch.equal(run(x), run(x.detach())), "training and inference give the same bits"


def test_rope_passes_gradients_to_trained_tables() -> None:
    x, cos, sin = (torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(lambda c, s: rope(x, c, s), (cos[:, 0], sin[:, 0]))


@pytest.mark.parametrize("unit_offset", [False, True])
def test_rms_norm_has_the_gradient_of_its_formula(unit_offset: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 6, generator=generator, requires_grad=True)
    weight = torch.randn(6, generator=generator, requires_grad=True)
    y = rms_norm(x, weight, 1e-6, unit_offset)
    grad = torch.randn(4, 6, generator=generator)
    scale = 1 + weight if unit_offset else weight
    wanted = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * scale
    torch.testing.assert_close(y, wanted)
    for mine, formula in zip(
        torch.autograd.grad(y, (x, weight), grad), torch.autograd.grad(wanted, (x, weight), grad), strict=True
    ):
        torch.testing.assert_close(mine, formula, atol=1e-5, rtol=1e-5)
