"""A fit in C finds what one with torch finds, of every shape of weight, scales and levels."""

from typing import Any

import pytest
import torch
from torch import Tensor

from graph.formats import native
from graph.formats.fitting import assign, level_sums, nearest_of, products
from graph.formats.levels import fit_levels, uniform_levels
from graph.formats.low_rank import fit_scales

needs_compiler = pytest.mark.skipif(not native.reads(torch.ones(1)), reason="no C compiler")


@pytest.fixture
def w() -> Tensor:
    """Of rows and columns that no vector divides, with ties between levels."""
    w = torch.randn(37, 531, generator=torch.Generator().manual_seed(0))
    w[3], w[4, ::2] = 0.0, -0.0
    w[5] = torch.arange(531) % 9 / 4 - 1  # half way between levels, where these are even
    return w


def scales_like(w: Tensor) -> Tensor:
    """Positive, negative, and nearly nothing."""
    s = torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) + 0.25
    s[5], s[6], s[7, ::3], s[8, ::3], s[9] = 1.0, -s[6], 0.0, -0.0, 1e-13
    return s


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_left", True)


@needs_compiler
@pytest.mark.parametrize("n", [2, 3, 4, 16, 64, 256])
@pytest.mark.parametrize("weighted", [False, True])
def test_both_pick_the_same_levels(w: Tensor, n: int, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    s, levels, moments = scales_like(w), uniform_levels(n), torch.rand(w.shape[1]) if weighted else None
    made, asked = torch.full(w.shape, 9, dtype=torch.uint8), torch.full(w.shape, 7, dtype=torch.uint8)
    error = assign(w, s, levels, moments, made)
    without_compiler(monkeypatch)
    assert error == pytest.approx(assign(w, s, levels, moments, asked), rel=1e-12)
    assert made.equal(asked)


@needs_compiler
@pytest.mark.parametrize("n", [2, 3, 16, 256])
@pytest.mark.parametrize("scaled", [False, True])
def test_both_find_the_same_nearest_levels(w: Tensor, n: int, scaled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    s, levels = scales_like(w) if scaled else None, uniform_levels(n)
    made = nearest_of(w, s, levels)
    without_compiler(monkeypatch)
    for one, asked in zip(made, nearest_of(w, s, levels), strict=True):
        assert one.equal(asked)
    assert made[1].equal(levels[made[0].int()])


@needs_compiler
@pytest.mark.parametrize("part", [slice(0, 531), slice(64, 200)])
@pytest.mark.parametrize("weighted", [False, True])
def test_both_multiply_alike_to_the_bit(
    w: Tensor, part: slice, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels, indices = uniform_levels(16), torch.randint(16, w.shape, dtype=torch.uint8)
    told = w[:, part], indices[:, part], levels, torch.rand(w[:, part].shape[1]) if weighted else None
    made = products(*told)
    without_compiler(monkeypatch)
    for one, asked in zip(made, products(*told), strict=True):
        assert one.equal(asked)


@needs_compiler
@pytest.mark.parametrize("weighted", [False, True])
def test_both_add_to_the_sums_of_levels(w: Tensor, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    told = w, scales_like(w), torch.randint(16, w.shape, dtype=torch.uint8), torch.rand(531) if weighted else None
    made, asked = torch.ones(2, 2, 16, dtype=torch.float64)
    level_sums(*told, *made)
    without_compiler(monkeypatch)
    level_sums(*told, *asked)
    torch.testing.assert_close(made, asked, rtol=1e-12, atol=0)
    assert not made.eq(1).any()


@needs_compiler
@pytest.mark.parametrize("told", [{"rank": 6}, {"group": 59}, {"rank": 3, "rows_per_lut": 12}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_fit_alike(dtype: torch.dtype, told: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(36, 531, generator=torch.Generator().manual_seed(2)).to(dtype)
    made = fit_scales(w, 8, moments=torch.rand(531, generator=torch.Generator().manual_seed(3)), **told)
    without_compiler(monkeypatch)
    asked = fit_scales(w, 8, moments=torch.rand(531, generator=torch.Generator().manual_seed(3)), **told)
    assert made.indices.equal(asked.indices) and made.levels.equal(asked.levels)
    assert made.errors == pytest.approx(asked.errors, rel=1e-12)


def test_what_is_not_a_number_has_the_first_level(w: Tensor) -> None:
    w[0, 0] = float("nan")
    out = torch.full(w.shape, 9, dtype=torch.uint8)
    assign(w, torch.ones_like(w), fit_levels(w[1], 4), None, out)
    assert out[0, 0] == 0
