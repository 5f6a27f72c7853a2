from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from graph.formats import fit, scales
from graph.formats.levels import nearest, uniform_levels
from graph.formats.low_rank import Fitted, expand_rank, fit_scales, group_absmax, low_rank_of_groups
from graph.formats.scales import LowRank, apart_from_zero

NORMAL = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)) * 0.02


LOW_RANK: dict[str, Any] = {"rank": 8}
GROUPS: dict[str, Any] = {"group": 32}
CHANNELS: dict[str, Any] = {"group": None}


def heavy_tailed() -> Tensor:
    torch.manual_seed(0)
    return torch.distributions.StudentT(torch.tensor(4.0)).sample(torch.Size((256, 512)))


def with_outliers() -> Tensor:
    w = NORMAL.clone()
    w[:, 5] *= 30
    w[7] *= 30
    return w


WEIGHTS = {
    "normal": NORMAL,
    "heavy-tailed": heavy_tailed(),
    "outliers": with_outliers(),
    "bf16": NORMAL.bfloat16(),
    "columns of all sizes": NORMAL * torch.logspace(-2, 0, 512),
    "tiny": NORMAL * 1e-6,
}


def product(parts: LowRank) -> Tensor:
    a, g, b = parts
    return (a * g) @ b


def scale_of(found: Fitted) -> Tensor:
    """S [out, in]."""
    if found.scale is not None:
        return found.scale.repeat_interleave(found.indices.shape[1] // found.scale.shape[1], dim=1)
    assert found.a is not None and found.g is not None and found.b is not None
    return product((found.a, found.g, found.b))


def levels_of(found: Fitted) -> Tensor:
    """Q [out, in]."""
    by_row = found.levels.view(-1, found.levels.shape[-1]).repeat_interleave(
        found.indices.shape[0] // max(1, found.levels.numel() // found.levels.shape[-1]), dim=0
    )
    return by_row.gather(1, found.indices.long())


def error(w: Tensor, found: Fitted, moments: Tensor | None = None) -> float:
    m = torch.ones(w.shape[1]) if moments is None else moments
    off = (w.float() - levels_of(found) * scale_of(found)).double().square() * m
    return float((off.sum() / (w.double().square() * m).sum()).sqrt())


def test_absmax_is_the_largest_magnitude_of_each_group() -> None:
    w = torch.tensor([[1.0, -3.0, 0.5, 0.25, -7.0], [0.0, 0.0, -2.0, 1.0, 0.0]])
    torch.testing.assert_close(group_absmax(w, 2), torch.tensor([[3.0, 0.5, 7.0], [1e-8, 2.0, 1e-8]]), atol=0, rtol=0)
    assert group_absmax(w.bfloat16(), 5).equal(torch.tensor([[7.0], [2.0]]))


@pytest.mark.parametrize(("rows", "columns", "group"), [(64, 128, 16), (4, 128, 16), (64, 120, 16), (3, 5, 8)])
def test_at_full_rank_the_scales_of_groups_come_back(rows: int, columns: int, group: int) -> None:
    s = group_absmax(torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)), group)
    a, g, b = low_rank_of_groups(s, group, columns, min(s.shape))
    torch.testing.assert_close(product((a, g, b)), s.repeat_interleave(group, 1)[:, :columns], atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(a.norm(dim=0), torch.ones(len(g)))
    torch.testing.assert_close(b.norm(dim=1), torch.ones(len(g)))
    assert (g.diff() <= 0).all()


def test_each_rank_is_the_best_of_its_rank_and_nearer_than_the_one_before() -> None:
    s = group_absmax(NORMAL[:, :500], 16)
    dense = s.repeat_interleave(16, 1)[:, :500]
    d = torch.linalg.svdvals(dense.double())
    before = float("inf")
    for rank in (1, 2, 4, 8, 16, 32):
        off = float((product(low_rank_of_groups(s, 16, 500, rank)) - dense).norm())
        best = float(d[rank:].square().sum().sqrt())
        assert off == pytest.approx(best, abs=1e-4)
        assert off <= before
        before = off


def test_ranks_beyond_those_of_the_groups_have_directions_and_no_magnitude() -> None:
    s = group_absmax(NORMAL, 128)
    a, g, b = low_rank_of_groups(s, 128, 512, 7)
    assert (a.shape, g.shape, b.shape) == ((256, 7), (7,), (7, 512))
    assert g[4:].tolist() == [0, 0, 0]
    torch.testing.assert_close(a.norm(dim=0), torch.ones(7))
    torch.testing.assert_close(b.norm(dim=1), torch.ones(7))
    torch.testing.assert_close(product((a, g, b)), s.repeat_interleave(128, 1))


def test_four_and_two_bits_of_normal_weights_are_as_near_as_they_should_be() -> None:
    w = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    start = group_absmax(w, 32)
    parts = low_rank_of_groups(start, 32, 1024, 32)
    uniform = {
        n: Fitted(uniform_levels(n), nearest(w / product(parts), uniform_levels(n)), None, *parts) for n in (4, 16)
    }
    assert error(w, uniform[16]) <= 0.095
    assert error(w, uniform[4]) == pytest.approx(0.455, abs=0.005)
    assert error(w, fit_scales(w, 4, rank=32, group=32, rounds=0)) <= 0.345
    assert error(w, fit_scales(w, 4, rank=32, group=32)) <= 0.325
    assert error(w, fit_scales(w, 16, rank=32, group=32)) <= 0.08


@pytest.mark.parametrize("w", WEIGHTS.values(), ids=WEIGHTS.keys())
@pytest.mark.parametrize("n", [4, 16])
@pytest.mark.parametrize("shape", [LOW_RANK, GROUPS, CHANNELS], ids=["low rank", "groups", "channels"])
def test_a_fit_is_clearly_nearer_than_absmax_and_never_turns_back(w: Tensor, n: int, shape: dict[str, Any]) -> None:
    found = fit_scales(w, n, **shape)
    assert list(found.errors) == sorted(found.errors, reverse=True)
    assert found.errors[-1] <= 0.95 * found.errors[0]
    assert error(w, found) == pytest.approx(found.errors[-1], rel=1e-4)
    again = nearest(w.float() / apart_from_zero(scale_of(found)), found.levels)
    assert float((found.indices != again).float().mean()) < 1e-4  # but for the rounding of the product
    assert found.levels.equal(found.levels.half().float())
    assert found.levels.abs().max() == 1.0


def test_it_starts_from_absmax_scales_and_uniform_levels() -> None:
    s = group_absmax(NORMAL, 32)
    start = Fitted(uniform_levels(4), nearest(NORMAL / s.repeat_interleave(32, 1), uniform_levels(4)), scale=s)
    assert fit_scales(NORMAL, 4, group=32, rounds=0).errors[0] == pytest.approx(error(NORMAL, start), rel=1e-6)


def test_sizes_of_columns_cost_a_low_rank_product_nothing() -> None:
    columns = torch.randn(512, generator=torch.Generator().manual_seed(1)).exp()
    rows = torch.randn(256, 1, generator=torch.Generator().manual_seed(2)).exp()
    plain, sized = fit_scales(NORMAL, 4, rank=8), fit_scales(NORMAL * columns * rows, 4, rank=8)
    assert sized.errors[-1] <= plain.errors[-1]


def test_columns_of_large_moments_are_fitted_more_closely() -> None:
    moments = torch.ones(512)
    moments[::2] = 100.0
    for shape in LOW_RANK, GROUPS:
        plain, weighted = fit_scales(NORMAL, 4, **shape), fit_scales(NORMAL, 4, moments=moments, **shape)
        assert error(NORMAL, weighted, moments) < 0.99 * error(NORMAL, plain, moments)
        assert error(NORMAL, weighted, moments) == pytest.approx(weighted.errors[-1], rel=1e-4)


def test_levels_can_be_symmetric_and_zero_free() -> None:
    for n in (4, 16):
        found = fit_scales(NORMAL, n, rank=8, symmetric=True, zero_free=True)
        assert found.levels.equal(-found.levels.flip(0))
        assert found.levels.abs().min() >= 2.0**-14
        assert found.errors[-1] <= 1.02 * fit_scales(NORMAL, n, rank=8).errors[-1]
    assert fit_scales(NORMAL, 5, group=32, symmetric=True).levels[2] == 0.0


def test_rows_with_levels_of_their_own_are_fitted_like_weights_of_their_own() -> None:
    flat = NORMAL.sign() * (1 + 0.1 * NORMAL)  # two clusters, unlike the rows above them
    w = torch.cat((NORMAL, flat[:128]))
    found = fit_scales(w, 4, group=32, rows_per_lut=128)
    assert found.levels.shape == (3, 4)
    alone = fit_scales(flat[:128], 4, group=32)
    mine = Fitted(found.levels[2], found.indices[256:], found.scale[256:] if found.scale is not None else None)
    assert error(flat[:128], mine) == pytest.approx(alone.errors[-1], rel=0.02)
    assert found.errors[-1] < fit_scales(w, 4, group=32).errors[-1]
    shared = fit_scales(w, 4, rank=8, rows_per_lut=128)
    assert error(w, shared) == pytest.approx(shared.errors[-1], rel=1e-4)


def test_the_same_weight_gives_the_same_bits() -> None:
    first, second = fit_scales(NORMAL, 4, rank=8), fit_scales(NORMAL, 4, rank=8)
    assert first.errors == second.errors
    for name in ("levels", "indices", "a", "g", "b"):
        assert getattr(first, name).equal(getattr(second, name))


def test_slices_of_rows_do_not_show_in_the_result(monkeypatch: Any) -> None:
    whole = fit_scales(NORMAL, 4, rank=8, rounds=1)
    monkeypatch.setattr(fit, "CHUNK", 3000)
    assert fit_scales(NORMAL, 4, rank=8, rounds=1).errors == pytest.approx(whole.errors, rel=1e-4)


def test_weights_without_values_are_fitted_without_harm() -> None:
    zero = fit_scales(torch.zeros(8, 32), 4, rank=2, group=16)
    assert zero.errors[-1] == 0.0
    empty_columns = NORMAL.clone()
    empty_columns[:, 32:96] = 0.0
    moments = torch.ones(512)
    moments[96:128] = 0.0
    for shape in LOW_RANK, GROUPS:
        found = fit_scales(empty_columns, 4, moments=moments, **shape)
        assert scale_of(found).isfinite().all()
        assert found.errors[-1] < 0.4
        one_row = fit_scales(NORMAL[:1], 4, **shape)
        assert one_row.errors[-1] < 0.4


def test_a_fit_goes_on_from_what_it_is_given() -> None:
    trained = fit_scales(NORMAL, 16, rank=8)
    again = fit_scales(NORMAL, 16, rank=8, start=trained)
    assert again.errors[0] == pytest.approx(trained.errors[-1], rel=1e-4)
    assert again.errors[-1] < trained.errors[-1]
    fewer = fit_scales(NORMAL, 4, rank=8, start=trained, rounds=0)
    assert fewer.errors[-1] <= fewer.errors[0]
    assert product((fewer.a, fewer.g, fewer.b)).allclose(scale_of(trained), rtol=1e-4)  # type: ignore[arg-type]
    groups = fit_scales(NORMAL, 4, group=32)
    assert groups.scale is not None
    held = groups.scale.clone()
    fit_scales(NORMAL, 4, group=32, start=groups)
    assert groups.scale.equal(held)


def test_new_ranks_change_nothing_and_point_where_the_error_falls_fastest() -> None:
    found = fit_scales(NORMAL, 4, rank=4)
    assert found.a is not None and found.g is not None and found.b is not None
    q = levels_of(found)
    a, g, b = expand_rank(NORMAL, q, found.a, found.g, found.b, 12)
    assert (a.shape, g.shape, b.shape) == ((256, 12), (12,), (12, 512))
    assert product((a, g, b)).equal(product((found.a, found.g, found.b)))
    torch.testing.assert_close(a.norm(dim=0), torch.ones(12))
    torch.testing.assert_close(b.norm(dim=1), torch.ones(12))
    slope = q * (NORMAL - q * scale_of(found))  # half the negative gradient of the squared error over S
    along = torch.einsum("ok,oi,ki->k", a[:, 4:], slope, b[4:])
    torch.testing.assert_close(along, torch.linalg.svdvals(slope)[:8], atol=0, rtol=0.03)
    wider = fit_scales(NORMAL, 4, rank=12, start=replace(found, a=a, g=g, b=b))
    assert wider.errors[0] == pytest.approx(found.errors[-1], rel=1e-4)
    assert wider.errors[-1] < fit_scales(NORMAL, 4, rank=4, start=found).errors[-1]


def test_new_ranks_of_a_weight_without_error_are_directions_all_the_same() -> None:
    w = torch.ones(4, 8)
    parts = low_rank_of_groups(group_absmax(w, 8), 8, 8, 1)
    a, g, b = expand_rank(w, w, *parts, 6)
    assert a.isfinite().all() and b.isfinite().all()
    torch.testing.assert_close(product((a, g, b)), w)


def test_a_plan_has_side_tensors_of_the_right_shape() -> None:
    w = torch.empty(48, 64, device="meta", dtype=torch.bfloat16)
    found = fit_scales(w, 4, rank=4, group=16)
    shapes = {name: tuple(getattr(found, name).shape) for name in ("levels", "indices", "a", "g", "b")}
    assert shapes == {"levels": (4,), "indices": (48, 64), "a": (48, 4), "g": (4,), "b": (4, 64)}
    assert fit_scales(w, 4, group=16, rows_per_lut=8).levels.shape == (6, 4)
    grouped = fit_scales(w, 4, group=16)
    assert grouped.scale is not None
    assert (grouped.scale.shape, grouped.scale.dtype, grouped.scale.is_meta) == ((48, 4), torch.float32, True)
    real = [torch.empty(shape, device="meta") for shape in ((48, 4), (4,), (4, 64))]
    a, g, b = expand_rank(w, w, real[0], real[1], real[2], 9)
    assert (a.shape, g.shape, b.shape) == ((48, 9), (9,), (9, 64))


def test_scales_near_zero_keep_their_sign() -> None:
    s = torch.tensor([1.0, 1e-20, -1e-20, 0.0, -2.0])
    assert apart_from_zero(s).tolist() == pytest.approx([1.0, 1e-12, -1e-12, 1e-12, -2.0])
    assert apart_from_zero(s[:1]) is not None and scales.SMALLEST_SCALE == 1e-12
