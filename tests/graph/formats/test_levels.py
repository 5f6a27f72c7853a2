import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from graph.errors import QcError
from graph.formats import kmeans, levels
from graph.formats.kmeans import exact_centres
from graph.formats.levels import fit_levels, monotone_levels, nearest, theta_of, uniform_levels

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def are_levels(found: Tensor) -> bool:
    """What holds of all levels: fp16 numbers in fp32, strictly increasing."""
    return found.dtype == torch.float32 and found.equal(found.half().float()) and bool((found.diff() > 0).all())


def square(values: Tensor, found: Tensor, weight: Tensor | None = None) -> float:
    """The weighted squared distance to the nearest level."""
    off = (values.double().reshape(-1, 1) - found.double()).abs().amin(1).square()
    return float((off if weight is None else off * weight.double().reshape(-1)).sum())


def least_square(points: Any, weights: Any, n: int) -> float:
    """The optimum of k-means by looking at all ways to cut the points into runs."""
    found = np.inf
    for cuts in itertools.combinations(range(1, len(points)), n - 1):
        total = 0.0
        for i, j in itertools.pairwise([0, *cuts, len(points)]):
            mean = np.average(points[i:j], weights=weights[i:j])
            total += float((weights[i:j] * (points[i:j] - mean) ** 2).sum())
        found = min(found, total)
    return found


def test_uniform_levels_are_a_grid_in_fp16() -> None:
    assert uniform_levels(4).tolist() == [-1.0, -0.33349609375, 0.33349609375, 1.0]
    for n in (2, 4, 8, 16, 64, 256):
        assert are_levels(uniform_levels(n))
        assert uniform_levels(n).equal(-uniform_levels(n).flip(0))
    assert uniform_levels(3, largest=2.0).tolist() == [-2.0, 0.0, 2.0]


def test_the_centres_are_the_best_of_all_ways_to_cut_the_points() -> None:
    random = np.random.default_rng(0)
    for m in (2, 3, 5, 8, 11):
        points, weights = np.sort(random.standard_normal(m)), random.random(m) + 0.01
        for n in range(1, m + 1):
            centres = exact_centres(points, weights, n)
            off = (weights * ((points[:, None] - centres) ** 2).min(1)).sum()
            assert off == pytest.approx(least_square(points, weights, n), abs=1e-12)


def test_the_centres_with_one_at_zero_are_the_best_such() -> None:
    random = np.random.default_rng(0)
    for m in (3, 6, 9):
        points, weights = np.sort(random.random(m)), random.random(m) + 0.01
        heavy = np.concatenate(([0.0], points)), np.concatenate(([1e9], weights))  # a weight that holds a centre at 0
        for n in range(1, m):
            centres = exact_centres(points, weights, n, first_at_zero=True)
            off = (weights * ((points[:, None] - centres) ** 2).min(1)).sum()
            assert centres[0] == 0.0
            assert off == pytest.approx(least_square(*heavy, n), abs=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
def test_values_of_scales_near_zero_weigh_nothing_and_disturb_nothing(symmetric: bool) -> None:
    w = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    scales = torch.ones(4096)
    scales[::3] = 1e-12
    found = fit_levels(w / scales, 4, scales.square(), symmetric=symmetric)
    beside = fit_levels(w[scales == 1], 4, symmetric=symmetric)
    assert torch.allclose(found / found.abs().max(), beside / beside.abs().max(), atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [2, 4, 7, 16])
def test_levels_of_16_bit_numbers_are_the_optimum_in_whatever_dtype_they_come(dtype: torch.dtype, n: int) -> None:
    values = torch.randn(3000).to(dtype)
    found = fit_levels(values, n)
    points, weights = np.unique(values.double().numpy(), return_counts=True)
    optimum = torch.from_numpy(exact_centres(points, weights.astype(np.float64), n))
    assert found.equal(optimum.half().float())
    if dtype == torch.bfloat16:
        assert fit_levels(values.float(), n).equal(found)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_weight_counts_like_so_many_copies(dtype: torch.dtype) -> None:
    values, copies = torch.randn(500).to(dtype), torch.randint(0, 4, (500,))
    assert fit_levels(values, 5, copies.float()).equal(fit_levels(values.repeat_interleave(copies), 5))


@pytest.mark.parametrize("kind", ["normal", "outliers", "far from zero", "two scales"])
def test_levels_of_many_fp32_numbers_are_within_a_fiftieth_of_a_decibel(kind: str, monkeypatch: Any) -> None:
    values = torch.randn(20_000)
    values[:3] = torch.tensor([900.0, -400.0, 250.0]) if kind == "outliers" else values[:3]
    values = values * 1e-3 + 10 if kind == "far from zero" else values
    values = torch.cat((values[:10_000], values[10_000:] * 1e-3)) if kind == "two scales" else values
    for n in (4, 16):
        points, weights = kmeans.weighted_points(values, None, n)
        assert points.size <= kmeans.POINTS
        centres = torch.from_numpy(exact_centres(points, weights, n))
        with monkeypatch.context() as patch:
            patch.setattr(kmeans, "POINTS", values.numel())
            optimum = torch.from_numpy(exact_centres(*kmeans.weighted_points(values, None, n), n))
        assert square(values, centres) <= 10 ** (0.02 / 10) * square(values, optimum)


def test_symmetric_levels_are_the_best_pairs() -> None:
    values = torch.randn(9).bfloat16()
    found = fit_levels(values, 4, symmetric=True)
    assert are_levels(found)
    assert found.equal(-found.flip(0))
    points = np.sort(values.abs().double().numpy())
    assert square(values, found) == pytest.approx(least_square(points, np.ones(9), 2), rel=1e-4)
    assert fit_levels(values, 5, symmetric=True)[2] == 0.0


HARD = {
    "nothing but zeros": torch.zeros(10),
    "one value": torch.full((10,), 0.25),
    "fewer values than levels": torch.tensor([-1.0, 0.0, 2.0]),
    "values that fp16 cannot tell apart": 1 + torch.arange(100) * 1e-6,
    "too large for fp16": torch.tensor([-1e6, 0.0, 7e4, 8e4, 9e4, 1e5, 1e6]),
    "too small for fp16": torch.randn(1000) * 1e-9,
    "all positive": torch.rand(1000) + 5,
    "all negative": -torch.rand(1000) - 5,
    "around zero": torch.tensor([-3.0, -1e-7, 0.0, -0.0, 1e-7, 3.0]),
}


@pytest.mark.parametrize("values", HARD.values(), ids=HARD.keys())
@pytest.mark.parametrize("n", [2, 4, 15, 16])
def test_fitted_levels_are_levels_whatever_they_are_fitted_to(values: Tensor, n: int) -> None:
    for symmetric, zero_free in itertools.product((False, True), (False, True)):
        if symmetric and zero_free and n % 2:
            continue
        found = fit_levels(values, n, symmetric=symmetric, zero_free=zero_free)
        assert found.shape == (n,)
        assert are_levels(found)
        assert not symmetric or found.equal(-found.flip(0))
        assert not zero_free or found.abs().min() >= 2.0**-14


def test_values_that_are_not_finite_are_an_error() -> None:
    for bad in (torch.inf, -torch.inf, torch.nan):
        for dtype in FLOATS:
            with pytest.raises(QcError) as caught:
                fit_levels(torch.tensor([1.0, bad, 2.0]).to(dtype), 2)
            assert str(caught.value) == (
                "the values to fit levels to are not all finite\n  fix    look for inf and nan in the weights"
            )


def test_the_nearest_level_is_the_lower_of_two_as_near() -> None:
    assert nearest(torch.tensor([-9.0, -0.5, -0.4, 0.5, 0.6, 9.0]), torch.tensor([-1.0, 0.0, 1.0])).tolist() == [
        0, 0, 1, 1, 2, 2,
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [2, 4, 16, 128, 256])
def test_the_nearest_level_is_that_of_least_distance(dtype: torch.dtype, n: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(levels, "CHUNK", 1000)
    found = uniform_levels(n)
    between = (found[1:] + found[:-1]) / 2
    values = torch.cat((torch.randn(2000), found, between)).to(dtype)[None]
    indices = nearest(values, found)
    assert indices.shape == values.shape
    distance = (values.double()[..., None] - found.double()).abs()
    assert indices.equal(distance.argmin(-1).to(torch.uint8))


THETAS = {
    "zero": lambda half: torch.zeros(half),
    "random": lambda half: torch.randn(half),
    "wild": lambda half: torch.randn(half) * 100,
    "one-sided": lambda half: torch.arange(half) * -50.0,
}


@pytest.mark.parametrize("n", [2, 4, 16, 64, 256])
@pytest.mark.parametrize("kind", THETAS)
@pytest.mark.parametrize("largest", [0.01, 1.0, 2.0, 1000.0])
def test_levels_that_train_are_levels_whatever_theta(n: int, kind: str, largest: float) -> None:
    found = monotone_levels(THETAS[kind](n // 2), largest)
    assert found.shape == (n,)
    assert are_levels(found)
    assert found.equal(-found.flip(0))
    assert found[-1] == torch.tensor(largest).half()


def test_theta_gets_the_gradient_of_the_levels_before_rounding() -> None:
    theta = torch.randn(4, requires_grad=True)
    wanted = torch.randn(8)
    (monotone_levels(theta) @ wanted).backward()
    again = theta.detach().double().requires_grad_()
    least = 2.0**-9
    upper = (least + (1 - 4 * least) * again.softmax(0)).cumsum(0)
    (torch.cat((-upper.flip(0), upper)) @ wanted.double()).backward()
    assert theta.grad is not None
    assert again.grad is not None
    torch.testing.assert_close(theta.grad.double(), again.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n", [2, 4, 16, 256])
def test_theta_of_levels_gives_them_back(n: int) -> None:
    for found in (uniform_levels(n), uniform_levels(n, 2.0), monotone_levels(torch.randn(n // 2))):
        torch.testing.assert_close(monotone_levels(theta_of(found), found[-1].item()), found, atol=0, rtol=2.0**-10)


def test_levels_that_are_not_symmetric_cannot_train() -> None:
    for found in (torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([-1.0, -0.5, 0.25, 1.0])):
        with pytest.raises(QcError) as caught:
            theta_of(found)
        assert str(caught.value) == (
            "levels train only where they are symmetric and even in number, and these are not\n"
            "  fix    fit them with symmetric: true, or leave the lut frozen"
        )


def test_a_plan_has_levels_of_the_right_shape() -> None:
    values = torch.empty(8, 16, device="meta")
    assert fit_levels(values, 4).shape == (4,)
    assert fit_levels(values, 4).is_meta
    indices = nearest(values, uniform_levels(4))
    assert (indices.shape, indices.dtype, indices.is_meta) == ((8, 16), torch.uint8, True)
    theta = theta_of(torch.empty(16, device="meta"))
    assert theta.shape == (8,)
    assert monotone_levels(theta).shape == (16,)
